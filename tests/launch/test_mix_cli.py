"""The commands that look into a run's mixture, and changes of the mixture on resume."""

import json
import shutil
from pathlib import Path

import pytest

from regrowth.files import write_text
from regrowth.pretrain.run_folder import RunFolder
from tests.launch.helpers import call, one_letter, only_run, write_config

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def trained(documents: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> RunFolder:
    """A run of six steps."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 6}, mixing={"policy": "odm", "warmup_steps": 2})
    code, output = call(capsys, monkeypatch, "train", config)
    assert code == 0, output
    return only_run(tmp_path)


def test_replay_explain_plot_and_a_changed_mixture(trained: RunFolder, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    code, output = call(capsys, monkeypatch, "mix", "replay", trained.path)
    assert code == 0 and "6 steps recomputed from their losses, all equal to the last bit" in output
    code, output = call(capsys, monkeypatch, "mix", "explain", trained.path, "--step", "3", "--documents", "4", "--text", "12")
    assert code == 0 and "step 3" in output and "prose.jsonl" in output + "prose.jsonl" and "train/" in output, output
    code, output = call(capsys, monkeypatch, "mix", "explain", trained.path, "--step", "7")
    assert code == 2 and "has no step 7; it has 0 to 5" in one_letter(output)
    code, output = call(capsys, monkeypatch, "mix", "plot", trained.path)
    assert code == 0 and (trained.path / "mixture.html").read_text().count("<svg") == 4

    resume = ["train", "--resume", trained.path, "run.steps=9"]
    for change, told in (
        ('mixing={policy="static", weights={prose=1.0}}', "mixing.weights: no share for programs"),
        ('mixing={policy="static", weights={prose=1.0, programs=0.5}}', "the weights sum to 1.5"),
        ('mixing={policy="static", weights={prose=1.0, program=0.0}}', 'did you mean "programs"?'),
        ("mixing.max_share=0.1", "the largest shares of 2 domains sum to 0.2"),
        ('loader.corpora=["nowhere"]', "this corpus does not exist"),
        ("loader.packing=fixed", "loader.packing cannot change once a run has begun"),
    ):
        before = (trained.path / "config.toml").read_text()
        code, output = call(capsys, monkeypatch, *resume, change)
        assert code == 2 and told in one_letter(output), output
        assert (trained.path / "config.toml").read_text() == before, "nothing was written"
    code, output = call(capsys, monkeypatch, *resume, 'mixing={policy="static", weights={prose=1.0, programs=0.0}}')
    assert code == 0, output
    assert {draw for row in trained.decisions()[6:] for draw in row["draws"]} == {1} and len(trained.decisions()) == 9
    code, output = call(capsys, monkeypatch, "mix", "replay", trained.path)
    assert code == 0 and "9 steps recomputed" in output
    code, output = call(capsys, monkeypatch, "report", trained.path)
    assert code == 0, output

    shutil.copytree(trained.path, other := tmp_path / "altered")
    rows = trained.rows("mixing")
    rows[2]["draws"][0] = 1 - rows[2]["draws"][0]
    write_text(other / "mixing.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    code, output = call(capsys, monkeypatch, "mix", "replay", other)
    assert code == 1 and "1 steps agree, then step 1: draws" in one_letter(output)
    code, output = call(capsys, monkeypatch, "mix", "replay", tmp_path)
    assert code == 2 and "not a run's folder" in one_letter(output)
