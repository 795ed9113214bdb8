"""Each cell of the fault matrix, with real processes: the run goes on or says how to, and ends with the very numbers of the run that nothing happened to."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.corpus import Corpus
from tests.faults.helpers import configured, numbers, ranks_of, struck_by
from tests.faults.lost_writes import checkpoints_told_of, lose_what_was_not_synced, need_births, strict_disk, whole_checkpoints
from tests.faults.matrix import CELLS, GOES_ON, RESUMED, STOPS, TOLD, UNDISTURBED, WHEN, Cell, table
from tests.launch.helpers import one_letter, only_run, regrowth, start, wait_for

# In the suite one of each way in which a rank can be lost; the rest is slow.
COVERING = {("kill -9", "1", "checkpoint write"), ("SIGSTOP", "0", "growth"), ("exception", "0", "evaluation")}


def cells() -> list[Any]:
    return [
        pytest.param(cell, id=str(cell), marks=() if (cell.what, cell.who, cell.when) in COVERING else pytest.mark.slow) for cell in CELLS
    ]


@pytest.mark.parametrize("cell", cells())
def test_a_fault_changes_nothing(cell: Cell, undisturbed: dict[str, Any], corpus: Corpus, tmp_path: Path) -> None:
    phase, step = WHEN[cell.when]
    fault = {"what": cell.what, "who": cell.who, "phase": phase, "step": step, "marker": str(tmp_path / "struck")}
    layers: dict[str, Any] = {"fault": fault}
    if cell.outcome == RESUMED:
        need_births(tmp_path)
        layers["disk"] = strict_disk(tmp_path / "runs")
    launcher = start("train", configured(tmp_path, corpus), env=struck_by(**layers))
    output = launcher.communicate(timeout=150)[0]
    assert (tmp_path / "struck").exists(), f"it never came to it: {output}"
    run = only_run(tmp_path)
    failures = [event for event in run.rows("events") if event["event"] == "failed"]
    if cell.what == "stuck":
        assert "rank 1 on " in failures[0]["reason"], "who was waited for is named"
    if cell.outcome in (UNDISTURBED, GOES_ON):
        assert launcher.returncode == 0 and "Traceback" not in output, output
        assert len(failures) == (cell.outcome == GOES_ON), failures
        assert all(failure["lost_steps"] <= 5 for failure in failures)
    else:
        dead = cell.outcome == RESUMED or (cell.who == "launcher" and cell.what == "kill -9")
        assert launcher.returncode == (-signal.SIGKILL if dead else 75 if cell.outcome == STOPS else 1), output
        if not dead:
            assert "regrowth train --resume" in one_letter(output)
            assert cell.what != "exception" or cell.outcome != TOLD or "a fault put there by a test" in one_letter(output)
        wait_for(lambda: not ranks_of(run))
        if cell.outcome == RESUMED:
            told = checkpoints_told_of(run)
            lose_what_was_not_synced(layers["disk"])
            assert told <= whole_checkpoints(run), "what was told of stands"
        again = regrowth("train", "--resume", run.path)
        assert again.returncode == 0, again.stdout + again.stderr
    assert numbers(run) == undisturbed
    assert not list(run.path.glob("checkpoints/.step-*")), "nothing half written is left"


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
