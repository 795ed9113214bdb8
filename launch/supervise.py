"""A run that is started again when a rank is lost: with a limit, a back-off, and every failure and what it cost in the run's events.

What a new start cannot mend (the config, a full disk, a loss that is not finite) is told at once. Everything else is: from the newest checkpoint, in the same job.
"""

import os
import subprocess
import time

from rich.console import Console

from regrowth.errors import RankLost, RegrowthError, RunFailed, Stopped
from regrowth.files import exclusive
from regrowth.launch.hanging import Hanging
from regrowth.launch.local import RankRaised, StopSignals, final_letter, run_local
from regrowth.launch.place import lock_of, note_place
from regrowth.launch.watch import Watch
from regrowth.pretrain.config import RunConfig, SupervisionConfig
from regrowth.pretrain.run_folder import RunFolder

_COMMAND_SECONDS = 60.0  # that a user's command may take
KNOWN_ENDS = ("stopped", "failed", "requeued")  # events that say already why a start of the run has ended


def supervise(run: RunFolder, config: RunConfig, corpus: str, console: Console) -> None:
    """Run all ranks to the run's end, with as many starts as it takes.

    Args:
        corpus: its folder or address.

    Raises:
        Stopped: on request.
        RankLost: again and again, without a checkpoint in between.
        RunFailed, UserError: what no new start mends.
    """
    refusal = f"{run.path}: another process is running this run. Wait for it, or stop it first: regrowth launch cancel {run.path}"
    with exclusive(lock_of(run), refusal):
        note_place(run, "local")
        try:
            with StopSignals() as asked:
                _start_until_done(run, config, corpus, console, asked)
        except RegrowthError as error:
            _note_end(run, error)
            if not isinstance(error, Stopped):
                tell_end(run, str(error), console)
            raise
        tell_end(run, f"{run.path}: finished.", console)


def _note_end(run: RunFolder, error: RegrowthError) -> None:
    """Write down an end that the ranks have not written down themselves."""
    if run.ended_by(*KNOWN_ENDS):
        return
    if isinstance(error, Stopped):
        run.log("events", {"event": "stopped", "time": time.time(), "step": max(run.checkpointed, 0)})
    else:
        note_loss(run, str(error))


def may_go_on(run: RunFolder) -> bool:
    """Whether a job that has ended before its run should go into the queue again: it was stopped or lost, and not again and again in the same place."""
    if run.finished or final_letter(run.path) or cancelled(run):
        return False
    here = [event for event in run.rows("events") if event["event"] == "requeued" and event["checkpoint"] == run.checkpointed]
    return len(here) < max(run.config().supervision.restarts, int(run.ended_by("stopped")))


def given_up(run: RunFolder) -> str:
    """Why a run does not go on by itself; empty if a person stopped it, or nothing is known."""
    if cancelled(run) or run.ended_by("stopped"):
        return ""
    if last := final_letter(run.path):
        return str(last)
    return next((str(event["reason"]) for event in reversed(run.rows("events")) if event["event"] == "failed"), "")


def cancelled(run: RunFolder) -> bool:
    """Whether this start was cancelled by a person."""
    names = [event["event"] for event in run.rows("events")]
    return "cancelled" in names[max((i for i, name in enumerate(names) if name in ("started", "resumed")), default=0) :]


def note_requeued(run: RunFolder, job: str) -> None:
    """Write down that a job goes into the queue again, and which work has to be done again."""
    if not run.ended_by(*KNOWN_ENDS):
        note_loss(run, f"{run.path}: job {job} ended before the run; {run.path}/logs and the job's log tell why")
    run.log("events", {"event": "requeued", "time": time.time(), "job": job, "checkpoint": run.checkpointed})


def _start_until_done(run: RunFolder, config: RunConfig, corpus: str, console: Console, asked: StopSignals) -> None:
    settings, lost_in_a_row, reached = config.supervision, 0, run.checkpointed
    while True:
        watch, hanging = Watch(run.path, config.run.steps, console), Hanging(run.path, config)
        ranks = run.plan().world_size
        if run.replanned:
            run.log("events", {"event": "ranks started", "time": time.time(), "ranks": ranks})
        try:
            return run_local(run.path, corpus, ranks, asked, watch, hanging)
        except Stopped:
            if not run.replanned:  # then other ranks go on
                raise
        except RankLost as loss:
            if (now := run.checkpointed) > reached:
                lost_in_a_row, reached = 0, now
            lost_in_a_row += 1
            note_loss(run, str(loss))
            if isinstance(loss, RankRaised) and not hanging.stepped:  # what is wrong from the start is wrong each time
                raise
            if lost_in_a_row > settings.restarts:
                raise (_given_up(loss, lost_in_a_row) if settings.restarts else loss) from None
            watch.close()
            _wait(run, loss, backoff(settings, lost_in_a_row), console, asked)
        finally:
            watch.close()


def backoff(settings: SupervisionConfig, losses: int) -> float:
    """Seconds to wait before the start after so many losses in a row."""
    return min(settings.backoff_seconds * 2 ** (losses - 1), settings.backoff_limit_seconds) if losses else 0.0


def losses_in_a_row(run: RunFolder) -> int:
    """How often the run was lost since its newest checkpoint was there, as its events tell."""
    here, found = max(run.checkpointed, 0), 0
    for event in reversed(run.rows("events")):
        if event["event"] in ("stopped", "requeued", "finished") or (
            event["event"] == "failed" and event["step"] - event["lost_steps"] != here
        ):
            break
        found += event["event"] == "failed"
    return found


def note_loss(run: RunFolder, letter: str) -> None:
    """Write down what failed, and which work has to be done again."""
    checkpoint = run.checkpointed
    again = [row for row in run.rows("metrics") if row["step"] >= checkpoint]
    event = {"event": "failed", "time": time.time(), "step": again[-1]["step"] + 1 if again else max(checkpoint, 0)}
    run.log("events", {**event, "reason": letter, "lost_steps": len(again), "lost_seconds": sum(row["seconds"] for row in again)})


def _wait(run: RunFolder, loss: RankLost, seconds: float, console: Console, asked: StopSignals) -> None:
    told = str(loss).partition(" The newest checkpoint stands")[0]
    console.print(f"{told} Starting again in {seconds:.0f} s.", style="yellow", markup=False, highlight=False, soft_wrap=True)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if asked.count:
            run.log("events", {"event": "stopped", "time": time.time(), "step": max(run.checkpointed, 0)})
            raise Stopped(f"{run.path}: stopped between two starts. Go on with: regrowth train --resume {run.path}") from loss
        time.sleep(0.1)


def _given_up(loss: RankLost, times: int) -> RunFailed:
    return RunFailed(
        f"{str(loss).rstrip()} It was lost {times} times in a row without a new checkpoint in between, and is not started again "
        "(supervision.restarts); the run's events.jsonl tells of each."
    )


def tell_end(run: RunFolder, message: str, console: Console) -> None:
    """Run the user's command for a run that is finished, or given up; whatever comes of it, the run's own outcome stands."""
    settings = run.config().supervision
    command = settings.on_end if run.finished else settings.on_failure
    if not command:
        return
    environment = {**os.environ, "REGROWTH_RUN": str(run.path.resolve()), "REGROWTH_MESSAGE": message}
    try:
        done = subprocess.run(command, shell=True, env=environment, timeout=_COMMAND_SECONDS, capture_output=True, text=True)
        outcome = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        outcome = f"not done after {_COMMAND_SECONDS:.0f} s, and ended"
    if outcome:
        console.print(f"note: supervision's command `{command}`: {outcome}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    run.log("events", {"event": "command run", "time": time.time(), "command": command, "outcome": outcome or "done"})
