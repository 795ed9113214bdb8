"""Where a run runs, or ran last: noted in its folder by whoever starts it, so that it can be watched, cancelled and taken up from any shell."""

import fcntl
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from regrowth.files import read_json, write_json
from regrowth.launch.local import letters
from regrowth.parallel.heartbeat import beats
from regrowth.pretrain.run_folder import RunFolder

ALIVE = ("running", "waiting", "ending", "elsewhere")
By = Literal["local", "slurm", "torchrun", "mpi"]
State = Literal["running", "waiting", "ending", "elsewhere", "finished", "stopped", "failed", "lost"]


@dataclass(frozen=True)
class Place:
    """What started a run last."""

    by: By
    host: str
    pid: int  # of the launcher, or of rank 0 where that is not ours
    job: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # of a Slurm job: those of `regrowth launch slurm`
    asked: dict[str, Any] = field(default_factory=dict)  # of a Slurm job: the config that its command gave when it began


def lock_of(run: RunFolder) -> Path:
    """What a launcher of this machine holds as long as it lives."""
    return run.path / ".launcher.lock"


def note_place(run: RunFolder, by: By, **more: Any) -> None:
    """Say that this process runs the run. `more`: further fields of `Place`."""
    write_json(run.path / "launch.json", asdict(Place(by, socket.gethostname(), os.getpid(), **more)))


def place_of(run: RunFolder) -> Place | None:
    """The last note; None for a run of another version."""
    path = run.path / "launch.json"
    try:
        return Place(**read_json(path)) if path.exists() else None
    except TypeError:
        return None


def last_sign(run: RunFolder) -> float | None:
    """Seconds since any rank did anything."""
    found = beats(run.path / "logs")
    return max(0.0, time.time() - max(beat.time for beat in found)) if found else None


def state_of(run: RunFolder, queue: dict[str, dict[str, int]]) -> tuple[State, str]:
    """What a run does, and a word on it.

    Args:
        queue: what Slurm says of its jobs (`launch.slurm.queued`).
    """
    place = place_of(run)
    if place and place.job and (told := queue.get(place.job)):
        told = ", ".join(told)
        return ("running" if told.startswith(("running", "completing")) else "waiting"), f"Slurm job {place.job}, {told}"
    if place and not place.job:
        if place.host != socket.gethostname():
            if not run.finished and not _end_of(run) and (ago := last_sign(run)) is not None and ago < _silence(run):
                return "elsewhere", f"on {place.host}, last sign {ago:.0f} s ago"
        elif held(lock_of(run)) or (place.by in ("torchrun", "mpi") and held(run.path / ".lock")):
            return "running", f"process {place.pid} on this machine"
        elif held(run.path / ".lock"):
            return "ending", "its launcher is gone; its ranks write a checkpoint and end"
    if run.finished:
        return "finished", ""
    if last := _end_of(run):
        return ("failed", str(last["reason"])) if last["event"] == "failed" else ("stopped", f"at step {last.get('step', 0)}")
    if said := [letter for letter in letters(run.path) if not letter.echo]:
        return "failed", said[0].message
    if place and place.job and not shutil.which("squeue") and (ago := last_sign(run)) is not None and ago < _silence(run):
        return "elsewhere", f"Slurm job {place.job}, last sign {ago:.0f} s ago; Slurm cannot be asked here"
    return "lost", "it neither runs nor said why it ended"


def _silence(run: RunFolder) -> float:
    """Seconds for which a run that lives may say nothing."""
    return run.config().run.timeout_seconds + 60.0


def _end_of(run: RunFolder) -> dict[str, Any] | None:
    """The event that tells how the last start ended."""
    for event in reversed(run.rows("events")):
        if event["event"] in ("stopped", "failed", "cancelled", "replanned"):
            return event
        if event["event"] in ("started", "resumed", "finished", "ranks started", "nodes checked"):
            return None
    return None


def held(path: Path) -> bool:
    """Whether a process of this machine holds a lock file."""
    if not path.exists():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
