"""`data select` as users run it: fit, look, train a family, compare, go on where it was stopped."""

import contextlib
import json
import signal
import sqlite3
import statistics
from pathlib import Path

import pytest

from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.files import read_json
from regrowth.launch.intervals import interval
from regrowth.launch.selection import load_recipe, needs_family
from tests.conftest import program, prose, write_jsonl
from tests.launch.helpers import call, regrowth, start, wait_for

RECIPE = """
out = "{folder}/out"
[data]
out = "{folder}/prepared"
name = "pool"
heldout_fraction = 0.1
sources = [{{kind = "jsonl", path = "{folder}/pool"}}]
tokenizer = {{vocabulary = 384, sample_megabytes = 1.0}}
shards = {{block_tokens = 4096}}
workers = 1
[target]
out = "{folder}/prepared"
name = "target"
heldout_fraction = 0.3
sources = [{{kind = "jsonl", path = "{folder}/target"}}]
workers = 1
[selectors.random]
kind = "random"
[selectors.dclm]
kind = "classifier"
training = {{buckets = 20000, dim = 16, lr = 0.5, epochs = 10}}
[selectors.matched]
kind = "length_matched"
like = "dclm"
fraction = 0.3
[selectors.preselect]
kind = "preselect"
models_file = "family"
losses = {{cache = "{folder}/losses.sqlite", device = "cpu"}}
training = {{buckets = 20000, dim = 16, lr = 0.5, epochs = 10}}
[selectors.miniplm]
kind = "difference"
teacher = "family/model-20"
reference = "family/model-10"
losses = {{cache = "{folder}/losses.sqlite", device = "cpu"}}
[training]
run = {{steps = 20, threads = 1, device = "cpu"}}
loader = {{sequence_length = 64, global_batch = 8, unit_sequences = 2}}
model = {{vocabulary = 384, width = 32, layers = 2, heads = 4, kv_heads = 2, head_dim = 8, ffn_width = 64}}
optimizer = {{lr = 0.01}}
schedule = {{warmup_steps = 2}}
parallel = {{micro_batch = 4}}
checkpoint = {{every = 20, keep = 1}}
evaluation = {{every = 20, final_sequences_per_domain = 4}}
[family]
steps = [10, 20]
documents = 20
[compare]
fraction = 0.3
seeds = 2
at_once = 2
documents = 20
choices = ["{folder}/choices.jsonl"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    pytest.importorskip("fasttext", reason="needs the fasttext extra")
    rows = [{"text": prose(n, 6 + n % 20)} for n in range(120)] + [{"text": program(n, 6 + n % 12)} for n in range(60)]
    write_jsonl(tmp_path / "pool" / "web.jsonl", rows)
    write_jsonl(tmp_path / "target" / "code.jsonl", [{"text": program(5000 + n, 8)} for n in range(60)])
    write_jsonl(tmp_path / "choices.jsonl", [{"query": "    return ", "choices": ["stone.river(7)", "a stone, a river"], "gold": 0}] * 4)
    (tmp_path / "selection.toml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path / "selection.toml"


def test_selectors_are_fitted_told_of_and_applied(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_by(*arguments: str | Path) -> str:
        code, told = call(capsys, monkeypatch, *arguments)
        assert code == 0, told
        return told

    shown = told_by("data", "select", "fit", recipe, "--only", "random,matched,dclm", "--dry-run")
    assert "to be fitted" in shown and not (recipe.parent / "out").exists()
    fitted = told_by("data", "select", "fit", recipe, "--only", "random,matched,dclm")
    assert "roc auc" in fitted and "mean characters kept" in fitted
    record = json.loads(told_by("data", "select", "describe", recipe.parent / "out/selectors/dclm", "--json"))
    assert record["findings"]["examples_of_each_class"] > 8 and record["files"].keys() == {"model.bin"}
    # A recipe of its own uses it, with another's documents.
    own = recipe.parent / "own.toml"
    own.write_text(f"""
        [data]
        out = "{recipe.parent}/own"
        heldout_fraction = 0.2
        sources = [{{kind = "jsonl", path = "{recipe.parent}/pool"}}]
        workers = 2
        tokenizer = {{vocabulary = 384}}
        transforms = [{{kind = "normalise"}}, {{kind = "selector", path = "{recipe.parent}/out/selectors/dclm"}},
                      {{kind = "keep_best", score = "dclm", fraction = 0.25, of = "tokens"}}]
    """)
    told = told_by("data", "run", own)
    assert "not_best" in told and "dclm: megaflops" in told


def test_what_a_recipe_lacks_is_said(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for command, letter in (
        (["fit", recipe, "--only", "dcml"], 'the recipe has no such selector; did you mean "dclm"?'),
        (["fit", recipe, "--only", "preselect"], "the family's models, which are not trained yet: regrowth data select train-family"),
        (["compare", recipe, "compare.baseline=chance"], "compare.baseline = chance: the recipe has no such selector"),
        (["compare", recipe, "--table"], "nothing is compared yet"),
        (["compare", recipe, "training.model.widht=3"], 'unknown key "model.widht"; did you mean "width"?'),
        (["fit", recipe, "selectors.dclm.kind=clasifier"], 'did you mean "classifier"?'),
        (["train-family", recipe, "family.steps=[3]"], "one model has no order"),
        (["train-family", recipe, "family.steps=[3,90]"], "90 is past the end of model's run"),
        (["fit", recipe, f'family.choices=["{recipe.parent}/choices.jsonl"]'], "models would be ordered by what selectors are judged by"),
        (["fit", recipe, f"target.sources.0.path={recipe.parent}/pool"], "training documents of the pool are held-out text of the target"),
        (["describe", recipe.parent], "no fitted selector is here"),
    ):
        code, told = call(capsys, monkeypatch, "data", "select", *command)
        assert code == 2 and letter in " ".join(told.split()), told
        assert "Traceback" not in told


def test_the_shipped_recipe_is_whole_and_asks_for_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("selection", [])
    assert recipe.compare.baseline in recipe.selectors and {needs_family(config, recipe) for config in recipe.selectors.values()} == {
        True,
        False,
    }
    code, told = call(
        capsys, monkeypatch, "data", "select", "compare", "selection", f"data.sources.0.path={tmp_path}/nothing", f"out={tmp_path}/out"
    )
    assert code == 2 and "nothing" in told and "Traceback" not in told


@pytest.mark.parametrize(("count", "t"), [(3, 4.303), (11, 2.228), (21, 2.086), (101, 1.984)])
def test_the_width_of_intervals_is_students(count: int, t: float) -> None:
    values = [float(n) for n in range(count)]
    assert interval(values)[1] == pytest.approx(t * statistics.stdev(values) / count**0.5, rel=2e-3)


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * (2.5**0.5) / 5**0.5, rel=1e-2)


@pytest.mark.slow
def test_a_comparison_is_made_and_gone_on_with_where_it_was_killed(recipe: Path) -> None:
    out = recipe.parent / "out"
    process = start("data", "select", "compare", recipe)
    wait_for(lambda: any((out / "runs").glob("*_dclm-*/metrics.jsonl")), seconds=300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    fitted = {path: path.stat().st_mtime_ns for path in (out / "selectors").glob("*/selector.json")}
    assert len(fitted) == 5
    done = regrowth("data", "select", "compare", recipe)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "selectors").glob("*/selector.json")} == fitted
    outcomes = {row["name"]: row for row in read_json(out / "comparison.json")}
    assert outcomes.keys() == {"random", "dclm", "matched", "preselect", "miniplm"}
    for name, row in outcomes.items():
        assert row["runs"].keys() == {"0", "1"} and all(0 < run["bits_per_byte"] < 9 and "accuracy" in run for run in row["runs"].values())
        # Seven tenths of the pool are left out; a classifier's 30% are of about the size of anyone's.
        assert 0.2 < row["tokens"] / (outcomes["random"]["tokens"] / 0.3) < 0.45, name
    assert outcomes["random"]["share"] == 0 < outcomes["dclm"]["share"] < min(outcomes[name]["share"] for name in ("miniplm", "preselect"))
    family, spent = read_json(out / "family" / "cost.json")["flops"], {name: row["flops"] for name, row in outcomes.items()}
    # A teacher and its reference, of one size, see each document of the pool; the family's models see a sample, and their training counts in either case.
    with contextlib.closing(sqlite3.connect(recipe.parent / "losses.sqlite")) as losses:
        run, each = dict(losses.execute("select model, sum(run) from losses group by model")), dict(losses.execute("select * from sizes"))
    assert len(each) == len(run) == 2 and len(set(each.values())) == 1 and max(run.values()) == min(run.values())
    assert spent["miniplm"] - family == pytest.approx(2 * sum(run.values()) * each.popitem()[1], rel=1e-3), (
        "told in megaflops for each batch"
    )
    assert family < spent["preselect"] <= spent["miniplm"] + spent["dclm"]
    # 60 of 180 documents are programs, in less than three tenths of the characters: all of them are among the best, or some.
    for name, wanted in (("dclm", range(60, 61)), ("random", range(5, 40))):
        (corpus,) = (out / "corpora").glob(f"{name}-*/")
        pipeline = Pipeline.open(corpus)
        assert pipeline.phases
        kept = [t for part in pipeline.parts.present() for batch in pipeline.parts.kept(part) for t in batch.column("text").to_pylist()]
        assert sum(text.startswith("def ") for text in kept) in wanted, name
    assert "bits per byte" in done.stdout and "<svg" in (out / "comparison.html").read_text()
    again = regrowth("data", "select", "compare", recipe, "--table").stdout
    assert "dclm" in again
    models = (out / "family" / "models.toml").read_text()
    assert models.count("[[models]]") == 2 and "higher_is_better = false" in models
