"""Each cell of the fault matrix, with real processes: the run goes on or says how to, and ends with the very numbers of the run that nothing happened to."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.corpus import Corpus
from regrowth.files import read_json
from regrowth.pretrain.run_folder import RunFolder
from tests.faults.matrix import CELLS, GOES_ON, STOPS, TOLD, UNDISTURBED, WHEN, Cell, table
from tests.launch.helpers import one_letter, only_run, regrowth, start, wait_for, write_config

_INJECTED = Path(__file__).parent / "inject"
# In the suite one of each way in which a rank can be lost; the rest is slow.
COVERING = {("kill -9", "1", "checkpoint write"), ("SIGSTOP", "0", "growth"), ("exception", "0", "evaluation")}


def configured(folder: Path, corpus: Corpus, **sections: Any) -> Path:
    """A run of two ranks with everything that a fault can hit."""
    values: dict[str, Any] = {
        "run": {"steps": 12, "timeout_seconds": 12.0, "deterministic": True},
        "data": None,
        "loader": {"corpus": str(corpus.folder), "sequence_length": 64, "global_batch": 8, "unit_sequences": 2},
        "parallel": {"dp_shard": 2, "micro_batch": 4},
        "checkpoint": {"every": 4, "keep": 8},
        "evaluation": {"every": 5},
        "growth": [{"at_step": 6, "operators": [{"op": "stack"}]}],
        "supervision": {"backoff_seconds": 0.1, "hang_seconds": 5.0},
    }
    return write_config(folder / "c.toml", folder, folder, **{**values, **sections})


def numbers(run: RunFolder) -> dict[str, Any]:
    """All that a fault must not change: losses, the samples of every step, the last weights and moments."""
    manifest = read_json(run.newest_checkpoint / "manifest.json") if run.newest_checkpoint else {}
    return {
        "losses": [(row["step"], row["loss"], row["grad_norm"]) for row in run.rows("metrics")],
        "samples": run.decisions(),
        "evaluations": [row for row in run.rows("evaluations") if row["step"] > 0],
        "weights": {name: row for name, row in manifest["files"].items() if name.startswith(("model/", "optimizer/"))},
    }


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = regrowth("train", configured(folder, corpus))
    assert done.returncode == 0, done.stderr
    found = numbers(only_run(folder))
    assert len(found["losses"]) == 12 and found["weights"] and found["evaluations"]
    return found


def cells() -> list[Any]:
    return [
        pytest.param(cell, id=str(cell), marks=() if (cell.what, cell.who, cell.when) in COVERING else pytest.mark.slow) for cell in CELLS
    ]


@pytest.mark.parametrize("cell", cells())
def test_a_fault_changes_nothing(cell: Cell, undisturbed: dict[str, Any], corpus: Corpus, tmp_path: Path) -> None:
    phase, step = WHEN[cell.when]
    fault = {"what": cell.what, "who": cell.who, "phase": phase, "step": step, "marker": str(tmp_path / "struck")}
    path = os.pathsep.join([str(_INJECTED), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "REGROWTH_TEST_FAULT": json.dumps(fault)}
    launcher = start("train", configured(tmp_path, corpus), env=environment)
    output = launcher.communicate(timeout=150)[0]
    assert (tmp_path / "struck").exists(), f"it never came to it: {output}"
    run = only_run(tmp_path)
    failures = [event for event in run.rows("events") if event["event"] == "failed"]
    if cell.outcome in (UNDISTURBED, GOES_ON):
        assert launcher.returncode == 0 and "Traceback" not in output, output
        assert len(failures) == (cell.outcome == GOES_ON), failures
        assert all(failure["lost_steps"] <= 5 for failure in failures)
    else:
        dead = cell.who == "launcher" and cell.what == "kill -9"
        assert launcher.returncode == (-signal.SIGKILL if dead else 75 if cell.outcome == STOPS else 1), output
        if not dead:
            assert "regrowth train --resume" in one_letter(output)
            assert cell.outcome != TOLD or "a fault put there by a test" in one_letter(output)
        wait_for(lambda: not ranks_of(run))
        again = regrowth("train", "--resume", run.path)
        assert again.returncode == 0, again.stdout + again.stderr
    assert numbers(run) == undisturbed
    assert not list(run.path.glob("checkpoints/.step-*")), "nothing half written is left"


def ranks_of(run: RunFolder) -> list[int]:
    """The ranks of a run that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"regrowth.pretrain.worker\0{run.path}\0" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_the_documentation_shows_the_matrix() -> None:
    assert len(CELLS) >= 60
    assert table() in (Path(__file__).parents[2] / "docs/reliability.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20, 100])
def test_random_kills_leave_the_numbers_as_they_are(kills: int, corpus: Corpus, tmp_path: Path) -> None:
    steps = 6 * kills
    sections = {"run": {"steps": steps, "timeout_seconds": 12.0, "deterministic": True}, "checkpoint": {"every": 2, "keep": 3}}
    plain = tmp_path / "undisturbed"
    plain.mkdir()
    assert regrowth("train", configured(plain, corpus, **sections)).returncode == 0
    rng = random.Random(kills)
    launcher = start("train", configured(tmp_path, corpus, **sections, supervision={"backoff_seconds": 0.0, "restarts": kills}))
    try:
        wait_for(lambda: list((tmp_path / "runs").glob("*_*/config.toml")), launcher)
        run = only_run(tmp_path)
        for _ in range(kills):
            after, until = len(run.rows("metrics")) + rng.randint(1, 3), time.monotonic() + rng.uniform(0, 10)
            wait_for(lambda after=after, until=until: len(run.rows("metrics")) >= after or time.monotonic() > until, launcher)
            wait_for(lambda: ranks_of(run), launcher)
            with suppress(ProcessLookupError):
                os.kill(rng.choice(ranks_of(run)), signal.SIGKILL)
        output = launcher.communicate(timeout=300)[0]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, output
    assert sum(event["event"] == "failed" for event in run.rows("events")) >= kills // 2, "two that are killed at once are one failure"
    assert numbers(run) == numbers(only_run(plain))
