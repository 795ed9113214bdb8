"""MPI ranks: `mpirun -n 4 regrowth data run RECIPE`. The first rank plans and opens the gates; every rank does its share of each phase."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.executors.local import Progress
from regrowth.data_pipeline.executors.ranks import pass_gates, work
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import reopened
from regrowth.errors import RegrowthError, RunFailed, UserError, need


def run_mpi(config: DataConfig, report: Progress, retry_failed: bool = False) -> tuple[Pipeline, bool]:
    """Do all phases over the ranks of MPI's world; every rank calls this and gets the finished pipeline, and whether it is the first.

    Raises:
        UserError: the input has to change, or mpi4py is missing.
        RunFailed: tasks failed. The same error on every rank.
    """
    mpi: Any = need("mpi4py.MPI", "the mpi executor")
    world = mpi.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    root = _first(world, lambda: str(reopened(Pipeline.plan_of(config).begin(), retry_failed).root))
    pipeline = Pipeline.open(Path(root))
    for number, phase in enumerate(pipeline.phases):
        _first(world, lambda n=number: pass_gates(pipeline, n, config.executor.max_failed))
        if rank == 0:
            report(phase.name, 0, size)
        work(pipeline, number, rank, size)
        _quiet_barrier(world)
        if rank == 0:
            report(phase.name, size, size)
    _first(world, lambda: pass_gates(pipeline, len(pipeline.phases), config.executor.max_failed))
    return pipeline, rank == 0


def _first(world: Any, action: Callable[[], Any]) -> Any:
    """Do something on rank 0 alone; all ranks get its result, or its error."""
    answer: tuple[str, Any] = ("", None)
    if world.Get_rank() == 0:
        try:
            answer = ("ok", action())
        except UserError as error:
            answer = ("user", str(error))
        except RegrowthError as error:
            answer = ("failed", str(error))
        except Exception as error:
            answer = ("failed", f"{type(error).__name__}: {error}")
    kind, value = world.bcast(answer, root=0)
    if kind == "user":
        raise UserError(value)
    if kind == "failed":
        raise RunFailed(value)
    return value


def _quiet_barrier(world: Any) -> None:
    """Wait for all ranks without burning a core: MPI's own barrier spins."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.02)
