"""How long a run waits before it is started again, and whom a job tells when it ends: from what the run's events say."""

from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.corpus import Corpus
from regrowth.launch.slurm import end_job
from regrowth.launch.supervise import backoff, given_up, losses_in_a_row, note_loss
from regrowth.pretrain.config import SupervisionConfig
from regrowth.pretrain.run_folder import RunFolder
from tests.pretrain.helpers import new_run


def lost(run: RunFolder, steps: int) -> None:
    """A start that did so many steps, and was lost."""
    run.log("events", {"event": "started", "time": 0.0})
    run.rewind(0)
    for step in range(steps):
        run.log("metrics", {"step": step, "seconds": 0.1})
    note_loss(run, "a rank was lost")


def test_losses_count_until_a_stop_or_a_new_checkpoint(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(corpus, tmp_path)
    assert losses_in_a_row(run) == 0
    for times in (1, 2, 3):
        lost(run, steps=times)
        assert losses_in_a_row(run) == times
    monkeypatch.setattr(RunFolder, "checkpointed", 2)  # one has come to stand
    assert losses_in_a_row(run) == 0
    lost(run, steps=4)
    assert losses_in_a_row(run) == 1
    run.log("events", {"event": "requeued", "time": 0.0, "checkpoint": 2})
    assert losses_in_a_row(run) == 0


def test_each_further_loss_waits_twice_as_long_up_to_a_limit() -> None:
    settings = SupervisionConfig(backoff_seconds=2.0, backoff_limit_seconds=7.0)
    assert [backoff(settings, losses) for losses in range(5)] == [0.0, 2.0, 4.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([{"event": "finished", "step": 8}], "ended: {run}: finished."),
        ([{"event": "failed", "step": 3, "reason": "the disk is gone", "lost_steps": 1}], "failed: the disk is gone"),
        ([{"event": "stopped", "step": 3}], None),
        ([{"event": "failed", "step": 3, "reason": "x", "lost_steps": 1}, {"event": "cancelled", "step": 3}], None),
    ],
)
def test_the_end_of_a_job_is_told_to_the_users_command(
    events: list[dict[str, Any]], told: str | None, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)  # nothing is put into a queue
    say = f'"$REGROWTH_MESSAGE" > {tmp_path}/told'
    run = new_run(corpus, tmp_path, supervision={"on_end": f"echo ended: {say}", "on_failure": f"echo failed: {say}"})
    for event in [{"event": "started"}, *events]:
        run.log("events", {**event, "time": 0.0})
    end_job(run.path)
    if told is None:
        assert not (tmp_path / "told").exists()
    else:
        assert (tmp_path / "told").read_text().strip() == told.format(run=run.path)
        assert bool(given_up(run)) == told.startswith("failed")
        assert run.rows("events")[-1]["event"] == "command run"
