"""The command line: quick to answer, one clear message for each fault, exit codes that schedulers can use."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regrowth.pretrain.checkpoint import verify
from regrowth.pretrain.run_folder import RunFolder
from tests.launch.helpers import call, one_letter, only_run, regrowth, write_config


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['regrowth', '--help']\nfrom regrowth.launch.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'pyarrow', 'numpy', 'pydantic', 'datasets', 'transformers', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    for command in (
        "quickstart",
        "data",
        "train",
        "grow",
        "convert",
        "generate",
        "report",
        "plan",
        "launch",
        "doctor",
        "evaluate",
        "lineage",
    ):
        assert f"  {command}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "quickstart", "optimizer.rl=3"], 'unknown key "optimizer.rl"'),
        (["train", "nowhere.toml"], "neither a file nor a recipe"),
        (["train"], "name a config"),
        (["train", "--resume", "/nonexistent"], "not a run's folder"),
        (["data", "show", "/nonexistent.toml"], "there is no such config"),
        (["data", "prepare", "quickstart", "data.sources=[{kind='jsonl', path='/none'}]"], "there is no such file or folder"),
        (["convert", "/nonexistent", "out"], "there is no such checkpoint folder"),
        (["convert", "/nonexistent", "out", "--to", "gguf"], 'writes "hf"'),
        (["grow", "/nonexistent"], "there is no such checkpoint folder"),
        (["grow", "/nonexistent", "op=stak"], 'op = "stak": no such op; did you mean "stack"?'),
        (["grow", "/nonexistent", "op=stack", "width=3"], 'unknown key "operators.0.width"'),
        (["grow", "/nonexistent", "op=stack", "--plan", "p.toml"], "the operators stand in it"),
        (["grow", "plan", "quickstart", "op=stak"], 'did you mean "stack"?'),
        (["average", "/nonexistent", "--out", "x"], "1 checkpoint given; name two or more"),
        (["average", "/nonexistent", "--out", "x", "--kind", "median"], "choose uniform or ema"),
        (["average", "/nonexistent", "--out", "x", "--last", "3"], "name its folder"),
        (["report", "/nonexistent"], "not a run's folder"),
        (["plan", "quickstart", "--cluster", "lapto"], 'did you mean "laptop"?'),
        (["generate", "/nonexistent"], "there is no such checkpoint folder"),
        (["launch", "slurm", "quickstart", "--nodes", "3"], "do not fall evenly"),
    ],
)
def test_the_users_faults_exit_with_two_and_one_paragraph(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = call(capsys, monkeypatch, *arguments)
    assert code == 2 and told in one_letter(output)


def test_debug_shows_the_traceback() -> None:
    done = regrowth("--debug", "train", "nowhere.toml")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_a_dry_run_shows_everything_and_starts_nothing(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, growth=[{"at_step": 4}])
    code, output = call(capsys, monkeypatch, "train", config, "--dry-run", "optimizer.lr=0.004")
    assert code == 0
    for shown in ("lr = 0.004", "prose.jsonl", "to be prepared", "step 4: 4 layers", "peak memory per rank", "Nothing was started"):
        assert shown in output
    assert not (tmp_path / "runs").exists() and not (tmp_path / "prepared").exists()


def test_the_whole_way_on_the_command_line(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """prepare, train on two ranks with growth, then every command on the result."""
    sections = {
        "run": {"steps": 8},
        "growth": [{"at_step": 4}],
        "parallel": {"dp_shard": 2, "micro_batch": 2},
        "checkpoint": {"every": 4, "keep": 5},
    }
    config = write_config(tmp_path / "c.toml", documents, tmp_path, mixing={"policy": "odm", "warmup_steps": 2}, **sections)
    code, output = call(capsys, monkeypatch, "data", "prepare", config)
    assert code == 0 and "funnel" in output and "programs" in output
    code, output = call(capsys, monkeypatch, "train", config)
    assert code == 0 and "grown (stack): 2 -> 4 layers" in output and "held-out bits per byte" in output
    run = only_run(tmp_path)
    assert run.finished and len(run.rows("metrics")) == 8
    code, output = call(capsys, monkeypatch, "data", "verify", config)
    assert code == 0 and "all whole" in output
    code, output = call(capsys, monkeypatch, "evaluate", run.path)
    assert code == 0 and "bits per byte" in output
    code, output = call(capsys, monkeypatch, "lineage", run.path)
    assert code == 0 and "grown by stack" in output and "tokens of prose" in output
    code, output = call(capsys, monkeypatch, "generate", run.path, "--prompt", "The", "--tokens", "5", "--temperature", "0")
    assert code == 0 and output.startswith("The")
    code, output = call(capsys, monkeypatch, "convert", run.path, tmp_path / "hf")
    assert code == 0 and (tmp_path / "hf/model.safetensors").exists() and (tmp_path / "hf/tokenizer.json").exists()
    code, output = call(capsys, monkeypatch, "convert", run.path, tmp_path / "hf")
    assert code == 2 and "an export never overwrites" in one_letter(output)
    code, output = call(capsys, monkeypatch, "grow", run.path, "op=hyperclone", "--dry-run")
    assert code == 0 and "keeps the function" in output and "would write" in output and not (run.path / "grown").exists()
    (chain := tmp_path / "chain.toml").write_text('moments = "zero"\n[[operators]]\nop = "interpose"\n[[operators]]\nop = "hyperclone"\n')
    code, output = call(capsys, monkeypatch, "grow", run.path, "--plan", chain, "--out", tmp_path / "chained")
    assert code == 0 and "interpose + hyperclone: changes the function" in output
    code, output = call(capsys, monkeypatch, "lineage", tmp_path / "chained")
    assert code == 0 and "grown by interpose + hyperclone (factor 2, factor 2, layers 4 to 8, width 32 to 64" in output, output
    code, output = call(capsys, monkeypatch, "grow", run.path, "op=hyperclone", "--out", tmp_path / "wider")
    assert code == 0 and "tokens of held-out text differ by at most" in output and "the function stays" in output, output
    mpirun = Path(sys.executable).parent / "mpirun"
    if importlib.util.find_spec("mpi4py") and mpirun.exists():
        command = [mpirun, "-n", "2", sys.executable, "-m", "regrowth", "grow", run.path, "op=hyperclone", "--out", tmp_path / "wide"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and done.stdout.count("the function stays") == 1, done.stdout + done.stderr
        assert verify(tmp_path / "wide")["id"] == verify(tmp_path / "wider")["id"], "two ranks of MPI wrote one file each"
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
        assert done.returncode != 0 and "growing never overwrites" in done.stderr and "Traceback" not in done.stderr
    code, output = call(capsys, monkeypatch, "grow", "plan", run.path, "op=interpose", "--ranks", "2")
    assert code == 0 and "Sunk into this checkpoint" in output and "In [[growth]]: parallel = {" in output, output
    code, output = call(capsys, monkeypatch, "grow", run.path, "factor=3", "--out", tmp_path / "grown")
    assert code == 0 and "12 layers" in output
    code, output = call(capsys, monkeypatch, "average", run.path, "--last", "9", "--out", tmp_path / "mean")
    assert code == 2 and "checkpoints; ask for fewer, or keep more" in one_letter(output)
    code, output = call(capsys, monkeypatch, "lineage", "verify", tmp_path / "chained", "--parent", run.path / "checkpoints/step-000008")
    assert code == 0 and "again, equal to the last bit" in output, output
    code, output = call(capsys, monkeypatch, "lineage", "verify", run.path / "checkpoints/step-000004-grown")
    assert code == 0 and "stack of" in output
    code, output = call(capsys, monkeypatch, "lineage", "verify", tmp_path / "chained", "--parent", run.path / "checkpoints/step-000004")
    assert code == 2 and "is not " in one_letter(output)
    code, output = call(capsys, monkeypatch, "lineage", "verify", run.path)
    assert code == 2 and "not fresh from a growth" in one_letter(output)
    before = sorted(run.path.glob("checkpoints/*"))
    code, output = call(capsys, monkeypatch, "grow", run.path)
    assert code == 0 and len(list(run.path.glob("grown/step-000008-stack-*/manifest.json"))) == 1
    assert sorted(run.path.glob("checkpoints/*")) == before, "growing offline leaves the run as it is"
    again = ["train", config, "run.name=again", f"run.start_from={tmp_path / 'grown'}", "growth=[]", "run.steps=4"]
    code, output = call(capsys, monkeypatch, *again)
    assert code == 0, output
    (second,) = (tmp_path / "runs").glob("*_again")
    code, output = call(capsys, monkeypatch, "lineage", second)
    assert code == 0 and output.count("grown by stack") == 2 and "continued by a new run" in output
    assert RunFolder(second).rows("metrics")[0]["layers"] == 12
    shutil.rmtree(second)
    code, output = call(capsys, monkeypatch, "report", run.path)
    html = (run.path / "report.html").read_text()
    assert code == 0 and html.count("<svg") == 6 + 1
    for shown in ("stack: 2 → 4 layers", "byte trigram", "grown by stack", "seconds per step", "held-out bits per byte"):
        assert shown in html
    assert "http://" not in html and "https://" not in html, "self-contained"
    code, output = call(capsys, monkeypatch, "train", "--resume", run.path)
    assert code == 0 and "finished already" in output
    code, output = call(capsys, monkeypatch, "train", "--resume", run.path, "model.layers=3", "loader.seed=5")
    assert code == 2 and "model and loader.seed cannot change once a run has begun" in one_letter(output)
    code, output = call(capsys, monkeypatch, "train", "--resume", run.path, "run.steps=10")
    assert code == 0 and len(run.rows("metrics")) == 10 and run.finished, output


def test_what_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrowth.errors import UserError, need

    for package, extra in (
        ("deepspeed", "deepspeed"),
        ("megatron.core", "megatron"),
        ("lm_eval", "eval"),
        ("mpi4py", "mpi"),
        ("fasttext", "fasttext"),
    ):
        for module in (package, package.split(".")[0]):
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(UserError, match=rf"this needs .*pip install -e '\.\[{extra}\]'"):
            need(package, "this")
    with pytest.raises(UserError, match=r"needs the package not_a_package\. Install it with: pip install not_a_package"):
        need("not_a_package", "this")


def test_the_doctor_finds_this_machine_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = call(capsys, monkeypatch, "doctor", "--json")
    findings = {f["check"]: f for f in json.loads(output)}
    assert code == 0, [f for f in findings.values() if f["level"] == "fault"]
    assert findings["two processes (gloo)"]["level"] == "ok"
    for package in ("torch", "datasets", "pyarrow", "fasttext", "mpi4py", "deepspeed", "megatron-core"):
        assert findings[package]["level"] == "ok" or findings[package]["remedy"].startswith("pip install -e ")
