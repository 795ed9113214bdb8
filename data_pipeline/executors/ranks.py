"""One rank of many does its share of a phase: what MPI ranks and Slurm array tasks call. Ranks need not know of each other."""

import traceback
from collections.abc import Callable

from regrowth.data_pipeline.executors.cores import share_cores, usable_cores
from regrowth.data_pipeline.phases.base import assigned
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.errors import RegrowthError, RunFailed, Stopped


def work(
    pipeline: Pipeline,
    phase_number: int,
    rank: int,
    world_size: int,
    on_done: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> tuple[int, list[str]]:
    """Do this rank's tasks of a phase, the settled phases before it taken for granted; returns how many were done, and letters of those that failed.

    Args:
        threads: of models; without it all cores that the process may use.

    Raises:
        Stopped: an end was asked for.
    """
    share_cores(threads or usable_cores())
    phase = pipeline.phases[phase_number]
    if phase.settled:
        return 0, []
    done, letters = 0, []
    try:
        for task in assigned(phase.task_sizes, list(range(len(phase.task_sizes))), rank, world_size):
            if phase.done(task):
                continue
            try:
                phase.run_task(task)
                done += 1
                on_done(task)
            except Stopped:
                raise
            except RegrowthError as error:
                letters.append(str(error))
            except Exception as error:
                traceback.print_exc()
                letters.append(f"{type(error).__name__}: {error}")
    finally:
        phase.release()
    return done, letters


def pass_gates(pipeline: Pipeline, phase_number: int, max_failed: int) -> None:
    """Settle the phases before `phase_number`.

    Raises:
        RunFailed: one of them is not done.
        UserError: no document is left.
    """
    for number, phase in enumerate(pipeline.phases[:phase_number]):
        phase.settle(max_failed)
        if number == 0:
            pipeline.refuse_nothing_left()


def run_alone(pipeline: Pipeline, report: Callable[[str, float, float], None], max_failed: int) -> None:
    """All phases, task after task, in this process."""
    for number, phase in enumerate(pipeline.phases):
        if phase.settled:
            continue
        pass_gates(pipeline, number, max_failed)
        sizes = phase.task_sizes
        left = phase.pending()
        total, done = sum(sizes), sum(sizes) - sum(sizes[t] for t in left)
        report(phase.name, done, total)
        failed = 0
        try:
            for task in left:
                try:
                    phase.run_task(task)
                except Exception as error:
                    failed += 1
                    if not phase.may_lose or failed > max_failed:
                        raise error if isinstance(error, RegrowthError) else RunFailed(phase.letter([task], max_failed)) from error
                report(phase.name, done := done + sizes[task], total)
        finally:
            phase.release()
        phase.settle(max_failed)
    pass_gates(pipeline, len(pipeline.phases), max_failed)
