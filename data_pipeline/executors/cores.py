"""How many threads a process of several takes: more than there are cores wait for each other, and make models several times slower."""

import os
import sys
from collections.abc import Iterable

_share: int | None = None  # of this process, where it is one of several


def usable_cores() -> int:
    """The cores that this process may run on, and that its Slurm job was given."""
    return min(len(cores_of_this_process()), _of_the_job())


def cores_of_this_process() -> set[int]:
    """Their numbers."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def share_beside(others: Iterable[set[int]]) -> int:
    """The threads of this process beside others of the same machine, from the cores of each, this one among them: bound to its own it has those, else a part of what all may use."""
    every = list(others)
    return max(1, min(usable_cores(), min(len(set().union(*every)), _of_the_job()) // len(every)))


def share_cores(threads: int) -> None:
    """Let models in this process take so many threads, and encoders one: other processes work beside it. OMP_NUM_THREADS, where somebody set it, goes before."""
    global _share
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    _share = max(1, threads)
    if "torch" in sys.modules:
        keep_to_share()


def keep_to_share() -> None:
    """Hold torch to this process's share; to be called before a model is loaded. No variable of the environment, which servers that the process starts would inherit."""
    if _share is not None and not os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(_share)


def _of_the_job() -> int:
    told = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return int(told) if told.isdigit() and int(told) else sys.maxsize
