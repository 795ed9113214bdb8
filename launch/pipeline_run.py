"""Make the stages of a chain: one after the other on this machine, or as Slurm jobs that wait for each other."""

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regrowth.errors import RegrowthError, RunFailed, Stopped, UserError, nearest
from regrowth.files import exclusive
from regrowth.launch.local import StopSignals
from regrowth.launch.on_cluster import options_on
from regrowth.launch.pipeline import BUSY, Pipeline, Record, State
from regrowth.launch.slurm import queued, render, render_stage, submit

_STYLES = {"finished": "green", "running": "green", "failed": "red", "lost": "red"}


def make(path: Path, on_slurm: bool, begin_at: str | None, dry_run: bool) -> None:
    """The `launch pipeline` command: what is finished and as it was is passed over.

    Args:
        begin_at: a stage that is made afresh, and with it all that need it.

    Raises:
        UserError: the file is wrong, or another process makes the chain.
        Stopped: on request; the same command goes on.
        RunFailed: a stage failed.
    """
    pipeline, console = Pipeline(path), Console(highlight=False, markup=False, soft_wrap=True)
    again = _from(pipeline, begin_at)
    states = pipeline.states(_queue(pipeline))
    if busy := [name for name in again if states[name][0] in BUSY]:
        raise UserError(f"{path}: stage {busy[0]} is {states[busy[0]][0]} ({states[busy[0]][1]}); wait for it or end it first.")
    todo = [name for name, (state, _) in states.items() if name in again or state not in ("finished", *BUSY)]
    if dry_run:
        for name in pipeline.order:
            told = "is made afresh" if name in again else states[name][0]
            console.print(f"{name}: {told}" + (f": {_shown(pipeline, name)}" if name in todo else ""))
        return
    (pipeline.folder / ".stages").mkdir(parents=True, exist_ok=True)
    with exclusive(pipeline.folder / ".stages" / "lock", f"{pipeline.folder}: another process makes this chain already."):
        for name in again:
            pipeline.forget(name)
        if on_slurm:
            _submit(pipeline, todo, console)
            return
        for name in todo:
            console.print(f"stage {name}: {_shown(pipeline, name)}")
            make_stage(pipeline, name)
        console.print(f"{pipeline.folder}: {'all stages are finished' if not _busy(pipeline) else 'the rest is in the queue'}")


def _from(pipeline: Pipeline, name: str | None) -> list[str]:
    if name is None:
        return []
    if name not in pipeline.stages:
        raise UserError(f"{pipeline.path}: --from {name}: there is no such stage; {nearest(name, pipeline.order)}")
    return pipeline.below(name)


def _shown(pipeline: Pipeline, name: str) -> str:
    return " ".join((["regrowth"] if pipeline.stages[name].run else []) + pipeline.command(name))


def _queue(pipeline: Pipeline) -> dict[str, dict[str, int]]:
    return queued([job for name in pipeline.order if (job := pipeline.job(name))])


def _busy(pipeline: Pipeline) -> bool:
    return any(state in BUSY for state, _ in pipeline.states(_queue(pipeline)).values())


def begin(pipeline: Pipeline, name: str, record_id: str | None = None) -> list[str]:
    """Get a stage ready to be made, afresh or from where it was stopped; returns the words of its command.

    What a stage made before from something else is put aside beside it, never removed.

    Args:
        record_id: of a submitted job: what it was submitted for.

    Raises:
        UserError: a stage that it needs is not finished, or the job was submitted for a state that is gone.
    """
    states = pipeline.states(
        {} if record_id else _queue(pipeline)
    )  # a job that this one has waited for may still be on its way out of the queue
    for need in pipeline.needs[name]:
        if states[need][0] != "finished":
            raise UserError(f"{pipeline.path}: stage {name} needs stage {need}, which is {states[need][0]}; {_told(states[need])}"
                            f"go on with: regrowth launch pipeline {pipeline.path}")  # fmt: skip
        link_run(pipeline, need)
    record = pipeline.record(name)
    if record_id and (record is None or record.id != record_id):
        raise UserError(f"{pipeline.path}: stage {name} was begun anew since this job was submitted; this job ends.")
    parts, command = pipeline.parts(name), pipeline.command(name)
    if record and record.parts and (record_id or record.parts == parts):
        run = pipeline.run_of(name) if pipeline.stages[name].trains else None
        pipeline.note(name, replace(record, exit_code=None, ended=None))
        return ["train", "--resume", str(run.path)] if run else command
    _put_aside(pipeline.out(name))
    pipeline.out(name).mkdir(parents=True, exist_ok=True)
    pipeline.note(name, Record(parts, id=record_id) if record_id else Record(parts))
    return command


def _told(state: tuple[State, str]) -> str:
    return f"{state[1]}; " if state[1] else ""


def _put_aside(folder: Path) -> None:
    """What was made in a stage's folder moves beside it; the logs of its jobs, of which one may be writing, stay."""
    old = [path for path in folder.iterdir() if path.name != "slurm"] if folder.exists() else []
    if not old:
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)


def link_run(pipeline: Pipeline, name: str) -> None:
    """Let a training stage's newest run be reached under a name that is known beforehand."""
    if pipeline.stages[name].trains and (run := pipeline.run_of(name)):
        link = pipeline.out(name) / "run"
        if not link.is_symlink() or link.readlink() != Path(run.path.name):
            link.unlink(missing_ok=True)
            link.symlink_to(run.path.name)


def make_stage(pipeline: Pipeline, name: str, record_id: str | None = None) -> None:
    """Make one stage in a process of its own, to its end.

    Raises:
        Stopped, UserError, RunFailed: as the stage ended.
    """
    with exclusive(pipeline.lock_of(name), f"{pipeline.path}: stage {name} is made by another process.") as lock:
        words = begin(pipeline, name, record_id)
        shell = pipeline.stages[name].shell is not None
        command = ["bash", "-eu", "-o", "pipefail", "-c", *words] if shell else [sys.executable, "-m", "regrowth", *words]
        code = _carry_out(command, lock.fileno())
        record = pipeline.record(name)
        assert record is not None
        pipeline.note(name, replace(record, exit_code=code, ended=time.time()))
    if code == 0:
        link_run(pipeline, name)
        return
    again = f"go on with: regrowth launch pipeline {pipeline.path}"
    if code == Stopped.exit_code:
        raise Stopped(f"{pipeline.path}: stage {name} was stopped; {again}")
    told = f"{pipeline.path}: stage {name} ended with exit code {code}; what it said is above. What is finished is not made again; {again}"
    error: RegrowthError = UserError(told) if code == UserError.exit_code else RunFailed(told)
    raise error


def one_stage(path: Path, name: str, record_id: str | None, only_begin: bool) -> None:
    """The hidden `launch stage` command: what a stage's job runs."""
    if only_begin:
        begin(Pipeline(path), name, record_id)
    else:
        make_stage(Pipeline(path), name, record_id)


def _carry_out(command: list[str], lock: int) -> int:
    """Run a command to its end, which holds the lock as long as it lives, and hand on what asks to stop; a third time ends it at once."""
    with StopSignals() as asked:
        child = subprocess.Popen(command, start_new_session=True, pass_fds=[lock])
        told = 0
        while True:
            try:
                code = child.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                if asked.count > told:
                    told = asked.count
                    child.send_signal(signal.SIGTERM if told < 3 else signal.SIGKILL)
        # What was asked to stop and knows no better way than to die of it has stopped.
        return Stopped.exit_code if told and code == -signal.SIGTERM else 128 - code if code < 0 else code


def _submit(pipeline: Pipeline, todo: list[str], console: Console) -> None:
    jobs = {name: pipeline.job(name) for name in pipeline.order if name not in todo}
    busy = [name for name, (state, _) in pipeline.states(_queue(pipeline)).items() if state in BUSY]
    if here := [name for name in busy if not jobs.get(name)]:
        raise UserError(f"{pipeline.path}: stage {here[0]} runs on this machine; wait for it first.")
    for name in todo:
        record = pipeline.record(name)
        if not record or not record.parts or record.parts != pipeline.parts(name) or any(need in todo for need in pipeline.needs[name]):
            record = Record()
        after = [jobs[need] for need in pipeline.needs[name] if need in (*todo, *busy)]
        pipeline.note(name, record)
        jobs[name] = submit(_script(pipeline, name, record), after).split()[-1]
        pipeline.note_job(name, jobs[name])
        console.print(f"stage {name}: job {jobs[name]}" + (f", after {', '.join(after)}" if after else ""))
    console.print(f"regrowth launch pipeline --status {pipeline.path}")


def _script(pipeline: Pipeline, name: str, record: Record) -> str:
    asked, stage = pipeline.slurm[name], pipeline.stages[name]
    options = options_on(asked.cluster, asked.model_dump(exclude_unset=True, exclude={"cluster", "cpus"}))
    ours = ["launch", "stage", str(pipeline.path.resolve()), name, "--record", record.id]
    logs = pipeline.folder / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    if not stage.trains:
        options = replace(options, gpus_per_node=asked.gpus_per_node)  # only what was asked for: most of these stages use none
        return render_stage(f"{pipeline.config.name}-{name}", ours, logs, options, asked.cpus)
    run = pipeline.run_of(name) if record.parts else None
    words = pipeline.command(name)
    ready = shlex.join([sys.executable, "-m", "regrowth", *ours, "--begin"])
    script, folder = render(*((str(run.path), []) if run else (words[1], words[2:])), replace(options, setup=[*options.setup, ready]))
    folder.mkdir(parents=True, exist_ok=True)
    return script


def status(path: Path, as_json: bool) -> None:
    """The chain's stages in a table: state, what they need, how long they took."""
    pipeline = Pipeline(path)
    rows: list[dict[str, Any]] = []
    for name, (state, told) in pipeline.states(_queue(pipeline)).items():
        record = pipeline.record(name)
        began = record.began if record and record.parts else None
        seconds = None if began is None else ((record.ended if record else None) or time.time()) - began
        rows.append({"stage": name, "state": state, "told": told, "after": pipeline.needs[name], "began": began,
                     "seconds": seconds if state in ("finished", "running", "failed", "stopped") else None, "job": pipeline.job(name),
                     "folder": str(pipeline.out(name))})  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("stage", "state", "after", "took", "", title=escape(f"{pipeline.config.name}: {pipeline.folder}"))
    for row in rows:
        style = _STYLES.get(row["state"], "yellow")
        took = "" if row["seconds"] is None else f"{row['seconds']:.0f} s" if row["seconds"] < 120 else f"{row['seconds'] / 60:.0f} min"
        table.add_row(row["stage"], f"[{style}]{row['state']}[/{style}]", escape(", ".join(row["after"])), took, escape(row["told"]))
    Console().print(table)
