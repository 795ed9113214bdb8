"""How many threads a process of several takes: more than there are cores wait for each other, and make models several times slower."""

import os
import sys


def usable_cores() -> int:
    """The cores that this process may run on, and that its Slurm job was given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE") or cores))


def take_threads(threads: int) -> None:
    """Let models in this process take so many threads (OMP_NUM_THREADS goes before), and encoders one: several processes share the cores. Before any of them is loaded, or torch at least has begun to work."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    wanted = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    if torch := sys.modules.get("torch"):  # has read its environment
        torch.set_num_threads(int(wanted.split(",")[0]))
