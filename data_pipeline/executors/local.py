"""Local workers: processes that are handed one task at a time. One that dies is replaced and its task is given to another."""

import collections
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.executors.cores import share_cores, usable_cores
from regrowth.data_pipeline.executors.ranks import pass_gates, run_alone
from regrowth.data_pipeline.phases.base import Phase
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.transform_config import Rephrase
from regrowth.errors import RegrowthError, RunFailed, UserError

# What the caller shows of the progress: (what is being done, how much is done, of how much).
Progress = Callable[[str, float, float], None]


def run_local(pipeline: Pipeline, workers: int, report: Progress) -> None:
    """Do all phases with `workers` processes (1: in this one).

    Raises:
        UserError: the input has to change.
        RunFailed: a task failed, or its process died more often than executor.attempts; run again to go on.
    """
    executor = pipeline.config.executor
    own = [t for t in pipeline.config.transforms if isinstance(t, Rephrase) and (t.local or (t.server and t.server.start))]
    if own and workers > 1:
        raise UserError(
            f"data.workers = {workers}: each of them would load a model of its own (rephrase). Set data.workers = 1, for one asks as much at once as the "
            "model takes; or start the server yourself and give its server.urls; or do the work as Slurm tasks (--executor slurm), of which each has its own."
        )
    if workers == 1:
        run_alone(pipeline, report, executor.max_failed)
        return
    team = _Team(pipeline.root, workers, executor.attempts)
    try:
        for number, phase in enumerate(pipeline.phases):
            if phase.settled:
                continue
            pass_gates(pipeline, number, executor.max_failed)
            team.do(number, phase, executor.max_failed, report)
            phase.settle(executor.max_failed)
        pass_gates(pipeline, len(pipeline.phases), executor.max_failed)
    finally:
        team.close()


class _Worker:
    def __init__(self, root: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, str(root)), daemon=True)
        with _ignoring_interrupts():  # Ctrl-C is the parent's business; a worker's task is whole or absent anyway
            self.process.start()
        theirs.close()
        self.task: int | None = None

    def give(self, phase: int, task: int, threads: int) -> None:
        self.task = task
        self.pipe.send((phase, task, threads))


class _Team:
    """Workers that stay for all phases."""

    def __init__(self, root: Path, size: int, attempts: int) -> None:
        self.root, self.size, self.attempts = root, size, attempts
        self.workers: list[_Worker] = []

    def do(self, number: int, phase: Phase, max_failed: int, report: Progress) -> None:
        """The tasks of a phase that are not done, the largest first."""
        sizes = phase.task_sizes
        queue = collections.deque(sorted(phase.pending(), key=lambda task: (-sizes[task], task)))
        total = sum(sizes)
        done = total - sum(sizes[task] for task in queue)
        deaths: collections.Counter[int] = collections.Counter()
        errors: list[RegrowthError] = []
        threads = usable_cores() // max(1, min(self.size, len(queue)))  # few tasks have more cores each
        report(phase.name, done, total)
        while queue or any(w.task is not None for w in self.workers):
            stop = len(errors) > (max_failed if phase.may_lose else 0)
            while not stop and queue and (worker := self._idle(len(queue))):
                try:
                    worker.give(number, queue[0], threads)
                    queue.popleft()
                except OSError:  # it died while it was idle
                    self._bury(worker)
            busy = {w.pipe: w for w in self.workers if w.task is not None}
            if not busy:
                if stop:
                    break
                continue
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # pyright: ignore[reportArgumentType]
                task = worker.task
                assert task is not None
                worker.task = None
                try:
                    error = worker.pipe.recv()
                except (EOFError, OSError):  # killed: by the kernel for want of memory, or by a person
                    self._bury(worker)
                    deaths[task] += 1
                    if deaths[task] < self.attempts:
                        queue.appendleft(task)
                        continue
                    error = RunFailed(
                        f"the process of task {task} was killed {deaths[task]} times (out of memory?); try fewer data.workers"
                    )
                    phase.folder.mkdir(parents=True, exist_ok=True)
                    phase.fail(task, str(error))
                if error is None:
                    report(phase.name, done := done + sizes[task], total)
                else:
                    errors.append(error)
        if len(errors) > (max_failed if phase.may_lose else 0):
            user = next((e for e in errors if isinstance(e, UserError)), None)
            told = " ".join(dict.fromkeys(str(error) for error in errors[:3]))
            raise user or RunFailed(
                f"{phase.folder}: {told} What is done is kept; run the same command again to go on with the rest."
            ) from errors[0]

    def _idle(self, wanted: int) -> _Worker | None:
        for worker in self.workers:
            if worker.task is None:
                return worker
        if len(self.workers) < min(self.size, wanted + sum(w.task is not None for w in self.workers)):
            self.workers.append(_Worker(self.root))
            return self.workers[-1]
        return None

    def _bury(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.join(timeout=5)

    def close(self) -> None:
        """End the workers; what they are at is simply done again next time."""
        for worker in self.workers:
            worker.pipe.close()
            if worker.task is not None:
                worker.process.kill()
        for worker in self.workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()


def _end_with_the_parent() -> None:
    """An orphan must not go on beside the run that takes up its tasks."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(pipe: Connection, root: str) -> None:
    """A worker: tasks in, None or an error out, until the pipe closes."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    pipeline = Pipeline.open(Path(root))
    while True:
        try:
            phase, task, threads = pipe.recv()
        except (EOFError, OSError):
            return
        answer: Any = None
        share_cores(threads)
        try:
            pipeline.phases[phase].run_task(task)
        except RegrowthError as error:
            answer = type(error)(str(error))
        except Exception as error:
            traceback.print_exc()
            answer = RunFailed(f"{type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except OSError:  # the parent is gone
            return


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started inside inherit that SIGINT is ignored."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, where no signal arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
