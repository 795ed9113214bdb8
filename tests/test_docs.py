"""The commands that the documentation shows are run, in the order of their page, on small data."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch

from regrowth.settings import read_toml
from tests.conftest import program, prose, write_jsonl
from tests.data_pipeline.small_model import build
from tests.launch.helpers import call, only_run, regrowth, write_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's `sh` blocks, split as a shell would."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def small_run(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small config and its finished run, which stand in for the quickstart's."""
    folder = tmp_path_factory.mktemp("docs")
    write_config(folder / "small.toml", documents, folder, parallel={"dp_shard": 2, "micro_batch": 2}, run={"steps": 4},
                 checkpoint={"every": 2})  # fmt: skip
    done = regrowth("train", folder / "small.toml")
    assert done.returncode == 0, done.stderr
    return folder / "small.toml", only_run(folder).path


SLOW_PAGES = ("parallel.md", "selection.md")  # have a part of the conformance suite, and a comparison


def small_selection(block: str, folder: Path) -> str:
    """The page's selection on small data, with a small model."""
    write_jsonl(folder / "my_documents" / "web.jsonl", [{"text": prose(n, 8 + n % 20) if n % 3 else program(n, 12)} for n in range(180)])
    write_jsonl(folder / "wanted" / "code.jsonl", [{"text": program(5000 + n, 8)} for n in range(60)])
    values = tomllib.loads(block)
    values["data"] |= {"out": str(folder / "prepared"), "tokenizer": {"vocabulary": 384}, "heldout_fraction": 0.1}
    values["target"] |= {"out": str(folder / "prepared")}
    values["training"] |= {
        "run": {"steps": 6, "threads": 1},
        "loader": {"sequence_length": 64, "global_batch": 8, "unit_sequences": 2},
        "model": {"vocabulary": 384, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_width": 64},
        "parallel": {"micro_batch": 4},
        "evaluation": {"final_sequences_per_domain": 2},
    }
    values["family"]["steps"], values["compare"]["seeds"] = [3, 6], 2
    values["selectors"]["preselect"]["positive_share"] = 0.3
    return tomli_w.dumps(values)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page.name in SLOW_PAGES else page
        for page in PAGES
        if "regrowth" in str(commands(page))
    ],
    ids=lambda p: p.name,
)
def test_the_commands_of_a_page_run(
    page: Path, small_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = small_run
    shutil.copy(config, tmp_path / "my_text.toml")
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), flags=re.DOTALL):
        if "[[stages]]" in block:
            (tmp_path / "chain.toml").write_text(block)
        if "[linears]" in block:
            (tmp_path / "mine.toml").write_text(block)
        if "[selectors.random]" in block:
            (tmp_path / "my_selection.toml").write_text(small_selection(block, tmp_path))
    if page.name == "rephrasing.md":
        values = read_toml(config)
        (tmp_path / "short.toml").write_text('name = "short"\ntemplate = "{text}"\nmax_tokens = 8\n')
        local = {"path": str(build(tmp_path / "model", 2048)), "device": "cpu"}
        transform = {
            "kind": "rephrase",
            "cache": str(tmp_path / "answers.sqlite"),
            "local": local,
            "styles": {"short": 1},
            "prompts": str(tmp_path),
        }
        values["data"] |= {"out": str(tmp_path / "prepared"), "workers": 1, "transforms": [transform]}
        (tmp_path / "my_rephrasing.toml").write_text(tomli_w.dumps(values))
    monkeypatch.chdir(tmp_path)
    ran = 0
    for words in commands(page):
        if words[0] != "regrowth":
            assert words[0] == "make", words
            continue
        arguments = [str(run) if w.startswith("runs/") else str(config) if w == "quickstart" else w for w in words[1:]]
        code, output = call(capsys, monkeypatch, *arguments)
        assert code == 0, f"{page.name}: {shlex.join(words)}\n{output}"
        ran += 1
    assert ran


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    named = {t for words in commands(page) if words[0] == "make" for t in words[1:] if "=" not in t}
    named |= {t for span in re.findall(r"`make ([a-z ]+)", text) for t in span.split()}
    for target in named:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0, target
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_documented_folder_of_a_run_is_what_a_run_leaves(small_run: tuple[Path, Path]) -> None:
    _, run = small_run
    for name in (
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "mixing.jsonl",
        "events.jsonl",
        "checkpoints",
        "logs/rank-0.log",
        "logs/rank-1.log",
    ):
        assert (run / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_benchmark_prints_its_ratios_in_its_short_form(program: Path) -> None:
    done = subprocess.run([sys.executable, str(program), "--quick"], capture_output=True, text=True, timeout=300)
    told = (" x as fast", "the limit is", "skipped: needs the real-text folder", "at least", "points apart")
    if program.stem == "kernels" and not torch.cuda.is_available():
        assert done.returncode == 2 and "needs a GPU" in done.stderr
        return
    assert done.returncode == 0 and any(words in done.stdout for words in told), done.stdout + done.stderr


def test_the_examples_of_config_in_the_docs_are_valid() -> None:
    from regrowth.data_pipeline.rephrase.prompts import Prompt
    from regrowth.data_pipeline.select.config import ModelSet
    from regrowth.kernels.recipe import PrecisionRecipe
    from regrowth.launch.pipeline_config import PipelineConfig
    from regrowth.launch.selection_config import SelectionRecipe
    from regrowth.pretrain.config import RunConfig
    from regrowth.pretrain.precision import expand
    from regrowth.settings import merge, validate

    base = read_toml(ROOT / "configs/quickstart.toml")
    for page in PAGES:
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(), flags=re.DOTALL):
            values = tomllib.loads(block)
            if "stages" in values:
                validate(PipelineConfig, values, page.name)
            elif "linears" in values:
                validate(PrecisionRecipe, expand(values), page.name)
            elif "selectors" in values:
                validate(SelectionRecipe, values, page.name)
            elif "higher_is_better" in values:
                validate(ModelSet, values, page.name)
            elif "template" in values:
                validate(Prompt, values, page.name)
            else:
                validate(RunConfig, merge(base, values), page.name)
