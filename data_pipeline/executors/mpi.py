"""MPI ranks: `mpirun -n 4 regrowth data run RECIPE`. The first rank plans and opens the gates; every rank does its share of each phase."""

from pathlib import Path

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.executors.cores import cores_of_this_process, share_beside
from regrowth.data_pipeline.executors.local import Progress
from regrowth.data_pipeline.executors.ranks import pass_gates, work
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import reopened
from regrowth.mpi import MpiRanks


def run_mpi(config: DataConfig, report: Progress, retry_failed: bool = False) -> tuple[Pipeline, bool]:
    """Do all phases over the ranks of MPI's world; every rank calls this and gets the finished pipeline, and whether it is the first.

    Raises:
        UserError: the input has to change, or mpi4py is missing.
        RunFailed: tasks failed. The same error on every rank.
    """
    world = MpiRanks()
    root = world.first(lambda: str(reopened(Pipeline.plan_of(config).begin(), retry_failed).root))
    pipeline, threads = Pipeline.open(Path(root)), share_beside(world.of_this_host(cores_of_this_process()))
    for number, phase in enumerate(pipeline.phases):
        world.first(lambda n=number: pass_gates(pipeline, n, config.executor.max_failed))
        if world.rank == 0:
            report(phase.name, 0, world.size)
        world.together(lambda n=number: work(pipeline, n, world.rank, world.size, threads=threads))
        if world.rank == 0:
            report(phase.name, world.size, world.size)
    world.first(lambda: pass_gates(pipeline, len(pipeline.phases), config.executor.max_failed))
    return pipeline, world.rank == 0
