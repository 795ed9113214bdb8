"""`data run` and `data status`: the phases of a corpus by local workers, MPI ranks or Slurm arrays, and how far they are."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.executors.ranks import pass_gates, work
from regrowth.data_pipeline.phases.base import Phase
from regrowth.data_pipeline.phases.curate import CuratePhase
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import reopened
from regrowth.data_pipeline.rephrase.cache import tokens_in
from regrowth.data_pipeline.status import PhaseStatus, corpus_status
from regrowth.data_pipeline.transform_config import Rephrase
from regrowth.errors import RunFailed, Stopped, UserError
from regrowth.files import read_json, write_json
from regrowth.launch.data import data_config, prepare_with_progress, print_corpus, show_plan
from regrowth.launch.rephrase import with_budget
from regrowth.launch.slurm import ArrayJob, queued, render_array, submit
from regrowth.mpi import started_by_mpi

_GATE_SECONDS = 20.0
_DRAIN_SECONDS = 30  # for answers that are under way when a task is to end


def run(
    recipe: str,
    overrides: list[str],
    executor: str | None,
    dry_run: bool,
    print_only: bool,
    wait: bool,
    retry_failed: bool,
    budget_tokens: int | None = None,
) -> None:
    """Make the corpus of a recipe with the executor it names, or the one given."""
    config, console = with_budget(data_config(recipe, overrides), budget_tokens), Console()
    kind = executor or ("mpi" if started_by_mpi() else config.executor.kind)
    if kind not in ("local", "mpi", "slurm"):
        raise UserError(f"--executor {kind}: choose local, mpi or slurm.")
    if dry_run:
        return show_plan(config, console)
    if kind == "mpi":
        return _run_mpi(config, console, retry_failed)
    if kind == "slurm":
        return _run_slurm(config, console, print_only, wait, retry_failed)
    corpus = prepare_with_progress(config, console, retry_failed)
    console.print(f"corpus {corpus.folder}", soft_wrap=True)
    return print_corpus(corpus, console)


def _run_mpi(config: DataConfig, console: Console, retry_failed: bool) -> None:
    from regrowth.data_pipeline.executors.mpi import run_mpi

    pipeline, first = run_mpi(config, lambda what, done, total: console.print(f"{what} {'...' if not done else 'done'}"), retry_failed)
    if first:
        corpus = Corpus.open(pipeline.root)
        console.print(f"corpus {corpus.folder}", soft_wrap=True)
        print_corpus(corpus, console)


def _run_slurm(config: DataConfig, console: Console, print_only: bool, wait: bool, retry_failed: bool) -> None:
    pipeline = Pipeline.plan_of(config)
    if not print_only and (busy := queued([job["id"] for job in _submitted(pipeline)])):
        raise UserError(f"{pipeline.root}: jobs {', '.join(busy)} of an earlier submission are still in the queue. Wait for them, or cancel them: "
                        f"scancel {' '.join(busy)}")  # fmt: skip
    if not print_only:
        pipeline = reopened(pipeline.begin(), retry_failed)
        (pipeline.root / "slurm").mkdir(exist_ok=True)
    if pipeline.finished:
        console.print(f"{pipeline.root}: finished already", soft_wrap=True)
        return
    jobs: list[dict[str, Any]] = []
    for number, ranks in _array_sizes(pipeline, config.workers):
        phase = pipeline.phases[number]
        script = render_array(
            ArrayJob(f"{config.name}-{phase.name}", pipeline.root, number, ranks, jobs[-1]["id"] if jobs else "", _gpus(phase, config)),
            config.executor,
        )
        if print_only:
            console.print(script, end="", markup=False, highlight=False, soft_wrap=True)
            jobs.append({"id": f"JOB_{number}"})
            continue
        jobs.append({"id": submit(script).split()[-1], "phase": phase.name, "ranks": ranks})
        write_json(pipeline.root / "slurm" / "jobs.json", jobs)
        console.print(f"{phase.name}: job {jobs[-1]['id']}, {ranks} array tasks", soft_wrap=True)
    if print_only:
        return
    console.print(f"regrowth data status {pipeline.root}", soft_wrap=True)
    if wait:
        _wait(pipeline.root, console)


def _gpus(phase: Phase, config: DataConfig) -> int:
    rephrases = isinstance(phase, CuratePhase) and any(isinstance(t, Rephrase) for t in phase.configs)
    return config.executor.gpus_per_task if rephrases else 0


def _array_sizes(pipeline: Pipeline, workers: int) -> list[tuple[int, int]]:
    """(phase, array tasks) of the phases that are not settled. How many tasks a later phase has is not known yet, but never more ranks are of use."""
    sizes, known = [], True
    for number, phase in enumerate(pipeline.phases):
        if known and phase.settled:
            continue
        sizes.append((number, 1 if phase.single else min(workers, len(phase.task_sizes)) if known else workers))
        known = False
    return sizes


def _submitted(pipeline: Pipeline) -> list[dict[str, Any]]:
    path = pipeline.root / "slurm" / "jobs.json"
    return read_json(path) if path.exists() else []


def _wait(root: Path, console: Console) -> None:
    with Live(console=console, refresh_per_second=1, transient=True) as live:
        while not (pipeline := Pipeline.open(root)).finished:
            live.update(_table(pipeline))
            if not _still_queued(pipeline):
                time.sleep(2.0)  # the last record may still be on its way
                if not Pipeline.open(root).finished:
                    raise RunFailed(f"{root}: no job is left in the queue and the corpus is not finished. `regrowth data status {root}` names the "
                                    f"tasks that failed; logs are in {root}/slurm.")  # fmt: skip
                break
            time.sleep(1.0)
    print_corpus(Corpus.open(root), console)


def _still_queued(pipeline: Pipeline) -> bool:
    try:
        return bool(queued([job["id"] for job in _submitted(pipeline)]))
    except RunFailed:  # the controller does not answer: nothing is known
        return True


def worker(folder: Path, phase: int, rank: int, world: int) -> None:
    """One rank's share of one phase: what an array task runs. SIGTERM stops it between or within tasks, nothing is lost but the task at hand; requests that are under way are
    waited for a while, for their answers are paid."""
    finished = 0
    engines: list[Any] = []  # that were asked to end

    def leave(*_: Any) -> None:
        for engine in engines:
            engine.abandon()
        # 75: it got something done, so another round will too.
        os._exit(75 if finished or any(engine.recorded for engine in engines) else 1)

    def stop(*_: Any) -> None:
        nonlocal engines
        engines = list(getattr(sys.modules.get("regrowth.data_pipeline.rephrase.engine"), "WORKING", ()))
        if not any(engine.is_busy for engine in engines):
            leave()
        for engine in engines:
            engine.end_soon("stopped by SIGTERM; what was answered is kept, and the same command goes on")
        signal.signal(signal.SIGALRM, leave)
        signal.alarm(_DRAIN_SECONDS)

    signal.signal(signal.SIGTERM, stop)
    pipeline = Pipeline.open(folder)
    executor = pipeline.config.executor
    if rank:  # the first rank opens the gate; that thousands read all records at once helps nobody. If it does not come, anyone may.
        until = time.monotonic() + _GATE_SECONDS
        while phase and not pipeline.phases[phase - 1].settled and time.monotonic() < until:
            time.sleep(0.5)
    try:
        pass_gates(pipeline, phase, executor.max_failed)
    except RunFailed as error:
        raise UserError(str(error)) from error  # no retry of this task can help

    def count(_: int) -> None:
        nonlocal finished
        finished += 1

    try:
        _, letters = work(pipeline, phase, rank, world, count)
    except Stopped:
        letters = []
    if engines:
        leave()
    if letters:
        raise RunFailed("; ".join(letters[:3]))
    if pipeline.phases[phase].kind == "finish":
        pipeline.phases[phase].settle(0)


def status(folder: Path, watch: bool) -> None:
    """The phases of a corpus, their tasks, throughput and what failed."""
    console = Console()
    if not watch:
        pipeline = Pipeline.open(folder)
        console.print(_table(pipeline))
        for transform in pipeline.config.transforms:
            if isinstance(transform, Rephrase) and (tokens := tokens_in(transform.cache)):
                console.print(f"rephrase: {sum(tokens):,} tokens are answered in {transform.cache}", soft_wrap=True, highlight=False)
        _print_failures(pipeline, console)
        return
    with Live(console=console, refresh_per_second=1) as live:
        while True:
            pipeline = Pipeline.open(folder)
            live.update(_table(pipeline))
            if pipeline.finished:
                return
            time.sleep(1.0)


def _table(pipeline: Pipeline) -> Table:
    state = "finished" if pipeline.finished else "not finished"
    table = Table("phase", "tasks", "documents", "MB of text", "MB/s", "left", "failed", title=f"{pipeline.root.name}: {state}")
    jobs = {job["phase"]: job["id"] for job in _submitted(pipeline)}
    try:
        states = queued(list(jobs.values())) if not pipeline.finished else {}
    except RunFailed:
        states = {}
    if states:
        table.add_column("in the queue")
    for row in corpus_status(pipeline):
        queue = ", ".join(f"{n} {s}" for s, n in states.get(jobs.get(row.name, ""), {}).items())
        table.add_row(*_cells(row), *([queue] if states else []))
    return table


def _cells(row: PhaseStatus) -> tuple[str, ...]:
    left = "" if row.seconds_left is None else f"{row.seconds_left / 60:.1f} min" if row.seconds_left > 90 else f"{row.seconds_left:.0f} s"
    failed = f"{row.given_up} given up" if row.given_up else str(len(row.failed) or "")
    return (row.name, f"{row.done:,} / {'?' if row.total is None else f'{row.total:,}'}", f"{row.documents:,}" if row.documents else "",
            f"{row.bytes / 1e6:,.1f}" if row.bytes else "", f"{row.bytes_per_second / 1e6:,.1f}" if row.bytes else "", left, failed)  # fmt: skip


def _print_failures(pipeline: Pipeline, console: Console) -> None:
    for row in corpus_status(pipeline):
        for letter in row.failed[:5]:
            console.print(f"{row.name}: {letter}", soft_wrap=True, highlight=False, markup=False)
    for letter in pipeline.given_up():
        console.print(f"left out: {letter}", soft_wrap=True, highlight=False, markup=False)
