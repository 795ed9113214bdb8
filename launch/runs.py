"""Runs as one sees them from any shell: how they are, how to end one, how to take one up."""

import json
import os
import shlex
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from regrowth.errors import RunFailed, UserError
from regrowth.launch.place import ALIVE, Place, last_sign, place_of, state_of
from regrowth.launch.slurm import JobOptions, launch, queued
from regrowth.pretrain.run_folder import RunFolder

_STYLES = {"running": "green", "finished": "green", "failed": "red", "lost": "red"}
_PATIENCE = 180.0  # seconds in which a run that was asked to stop has finished its step and its checkpoint


def status(folder: Path, as_json: bool) -> None:
    """The `launch status` command: of one run, or of all runs in a folder.

    Raises:
        UserError: there is none.
    """
    runs = [RunFolder(folder)] if (folder / "config.toml").exists() else [RunFolder(p.parent) for p in sorted(folder.glob("*/config.toml"))]
    if not runs:
        raise UserError(f"{folder}: neither a run's folder nor a folder of runs.")
    places = [place_of(run) for run in runs]
    queue = queued([place.job for place in places if place and place.job])
    rows = []
    for run, place in zip(runs, places, strict=True):
        try:
            rows.append(_row(run, place, queue))
        except UserError as error:  # of another version
            if len(runs) == 1:
                raise
            Console(stderr=True).print(f"note: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("run", "state", "step", "loss", "checkpoint", "starts", "failures", "last sign")
    for row in rows:
        ago = row["last_sign_seconds"]
        style = _STYLES.get(row["state"], "yellow")
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        table.add_row(Path(row["run"]).name, f"[{style}]{row['state']}[/{style}]", f"{row['step']}/{row['steps']}", loss,
                      "" if row["checkpoint"] is None else str(row["checkpoint"]), str(row["starts"]), str(row["failures"]),
                      "" if ago is None else _ago(ago))  # fmt: skip
    console = Console()
    console.print(table)
    for row in rows:
        if row["told"] and len(rows) == 1:
            console.print(row["told"], markup=False, highlight=False, soft_wrap=True)


def _row(run: RunFolder, place: Place | None, queue: dict[str, dict[str, int]]) -> dict[str, Any]:
    state, told = state_of(run, queue)
    events, metrics = run.rows("events"), run.rows("metrics")
    return {
        "run": str(run.path),
        "state": state,
        "told": told,
        "step": metrics[-1]["step"] + 1 if metrics else 0,
        "steps": run.config().run.steps,
        "loss": metrics[-1]["loss"] if metrics else None,
        "checkpoint": run.checkpointed if run.checkpointed >= 0 else None,
        "starts": sum(event["event"] in ("started", "resumed") for event in events),
        "failures": sum(event["event"] == "failed" for event in events),
        "last_sign_seconds": last_sign(run),
        "place": asdict(place) if place else None,
    }


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def cancel(folder: Path, now: bool) -> None:
    """The `launch cancel` command: a checkpoint and an orderly end; with `now`, an end at once. It does not go on by itself afterwards.

    Raises:
        UserError: it is not running, or on another machine.
        RunFailed: it does not end.
    """
    run, console = RunFolder.open(folder), Console(highlight=False)
    place = place_of(run)
    state, told = state_of(run, queued([place.job] if place and place.job else []))
    if place is None or state not in ("running", "waiting", "ending"):
        there = f" Run this on {place.host}." if place and state == "elsewhere" else ""
        raise UserError(f"{run.path}: not running here ({state}{f': {told}' if told else ''}).{there}")
    console.print(
        f"{run.path}: {told}; " + ("ending it ..." if now or state == "waiting" else "asking it to write a checkpoint and stop ...")
    )
    if place.job:  # its script must not put it into the queue again
        run.log("events", {"event": "cancelled", "time": time.time(), "step": max(run.checkpointed, 0), "job": place.job})
        gently = state == "running" and not now
        _scancel([*(["--signal=TERM"] if gently else []), place.job])
    elif state == "running":
        os.kill(place.pid, signal.SIGTERM)
        if now:
            time.sleep(0.5)  # two of one kind in one moment are one
            os.kill(place.pid, signal.SIGTERM)
    until = time.monotonic() + _PATIENCE
    while state in ALIVE:
        if time.monotonic() > until:
            raise RunFailed(
                f"{run.path}: still there after {_PATIENCE:.0f} s. End it at once with: regrowth launch cancel --now {run.path}"
            )
        time.sleep(0.5)
        state, told = state_of(run, queued([place.job] if place.job else []))
    newest = run.newest_checkpoint
    console.print(f"ended; {f'the newest checkpoint is {newest.name}' if newest else 'there is no checkpoint'}. "
                  f"Go on with: regrowth launch resume {run.path}", soft_wrap=True)  # fmt: skip


def _scancel(arguments: list[str]) -> None:
    try:
        done = subprocess.run(["scancel", *arguments], capture_output=True, text=True, timeout=60)
        refused = done.stderr.strip() if done.returncode else ""
    except (subprocess.TimeoutExpired, OSError) as error:
        refused = str(error)
    if refused:
        raise RunFailed(f"launch cancel: scancel {' '.join(arguments)}: {refused}")


def resume(folder: Path, overrides: list[str]) -> None:
    """The `launch resume` command: as it was started before, on this machine or as a Slurm job with the same options.

    Raises:
        UserError: it is running, or was started by mpirun or srun.
    """
    run = RunFolder.open(folder)
    place = place_of(run)
    state, told = state_of(run, queued([place.job] if place and place.job else []))
    if state in ALIVE:
        raise UserError(f"{run.path}: {state} already ({told}).")
    if place and place.by == "slurm":
        launch(str(run.path), overrides, JobOptions(**place.options))
        return
    if place and place.by == "mpi":
        again = shlex.join(["regrowth", "launch", "mpi", str(run.path), *overrides])
        raise UserError(f"{run.path}: was started by mpirun or srun. Go on in the same way: mpirun -n {run.plan().world_size} {again}; "
                        f"or with ranks of this machine: regrowth train --resume {shlex.quote(str(run.path))}")  # fmt: skip
    from regrowth.launch.training import train

    train(None, overrides, run.path, dry_run=False)
