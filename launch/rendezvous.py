"""Where a process stands among the ranks that mpirun or srun started, and where they all meet. Read from the environment, or asked of MPI."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from regrowth.errors import UserError
from regrowth.mpi import MpiRanks

# Rank, ranks, rank on the host, ranks on the host: of Open MPI, MVAPICH, and MPICH with its relatives.
_STARTERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_SIGNS_OF_MPI = (*(names[0] for names in _STARTERS), "PMIX_RANK", "PALS_RANKID", "PMI_CONTROL_PORT")


class Standing(NamedTuple):
    """A process among the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def one_host(self) -> bool:
        """Whether all ranks are on this host."""
        return self.local_size == self.size


def world_of_mpi(environment: Mapping[str, str]) -> MpiRanks | None:
    """MPI's world, if MPI started this process and mpi4py is here and of the same MPI."""
    if not any(name in environment for name in _SIGNS_OF_MPI):
        return None
    try:
        world = MpiRanks()
    except (UserError, RuntimeError):  # no mpi4py; or one without its library
        return None
    told = standing(environment)
    return world if told is None or told.size == world.size else None  # for another MPI, every process is alone in the world


def standing(environment: Mapping[str, str]) -> Standing | None:
    """What the environment says; None if neither mpirun nor srun started this process."""
    slurm = _slurm(environment)
    for rank, size, local_rank, local_size in _STARTERS:
        if rank in environment and size in environment:
            found = Standing(int(environment[rank]), int(environment[size]), -1, -1)
            if local_rank in environment and local_size in environment:
                return found._replace(local_rank=int(environment[local_rank]), local_size=int(environment[local_size]))
            if slurm and slurm[:2] == found[:2]:
                return slurm
            return found._replace(local_rank=found.rank, local_size=found.size)
    return slurm


def _slurm(environment: Mapping[str, str]) -> Standing | None:
    # A batch script has SLURM_NTASKS and SLURM_PROCID too, and is no task; only srun tells of the step's tasks.
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if not all(name in environment for name in names):
        return None
    rank, size, local_rank = (int(environment[name]) for name in names)
    by_node: list[int] = []
    for group in (environment.get("SLURM_STEP_TASKS_PER_NODE") or str(size)).split(","):  # such as 8(x3),4
        tasks, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group).groups()  # pyright: ignore[reportOptionalMemberAccess]
        by_node += [int(tasks)] * int(times or 1)
    return Standing(rank, size, local_rank, by_node[int(environment.get("SLURM_NODEID", "0"))])


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes, such as `node[003-005,9],other`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else nodes)


def meeting(environment: Mapping[str, str], here: Standing, world: MpiRanks | None) -> dict[str, str]:
    """The variables by which torch finds the other ranks. MASTER_ADDR and MASTER_PORT win where they are set.

    Raises:
        UserError: the ranks cannot tell each other where to meet.
    """
    own = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}
    if world is not None:
        place = world.first(lambda: _chosen(here, own))
    elif len(own) == 2 or here.size == 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", **own}
    elif nodes := environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST"):
        number = int(environment.get("SLURM_JOB_ID", 0)) * 31 + int(environment.get("SLURM_STEP_ID", 0))
        # Below the ports that Linux gives to whoever asks for any.
        place = {"MASTER_ADDR": "127.0.0.1" if here.one_host else first_host(nodes), "MASTER_PORT": str(20000 + number % 12000), **own}
    else:
        raise UserError("launch mpi: the ranks cannot tell each other where to meet, because mpi4py is missing or made for another MPI. Install it "
                        "(pip install -e '.[mpi]'), or set MASTER_ADDR and MASTER_PORT to the first rank's host and a free port.")  # fmt: skip
    told = {
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.size),
        "LOCAL_RANK": str(here.local_rank),
        "LOCAL_WORLD_SIZE": str(here.local_size),
        **place,
    }
    if _gpus_are_bound(environment):
        told["REGROWTH_OWN_GPU"] = "1"
    if here.one_host and Path("/sys/class/net/lo").exists():
        told |= {name: environment.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return told | {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // here.local_size))}


def _gpus_are_bound(environment: Mapping[str, str]) -> bool:
    """Whether srun shows each of its tasks GPUs of its own (`--gpus-per-task`, `--gpu-bind`)."""
    by_task = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    return by_task or environment.get("SLURM_GPU_BIND", "none") != "none"


def _chosen(here: Standing, own: dict[str, str]) -> dict[str, str]:
    """By rank 0: ranks of one host meet at a file, as those of a local run do, with no port open to others; unless its environment names a place."""
    address = "127.0.0.1" if here.one_host else socket.gethostname()
    with socket.socket() as free:
        free.bind(("", 0))
        place = {"MASTER_ADDR": address, "MASTER_PORT": str(free.getsockname()[1]), **own}
    if here.one_host and not own:
        place["REGROWTH_STORE"] = str(Path(tempfile.mkdtemp(prefix="regrowth-")) / "store")
    return place


def clear_away(here: Standing | None) -> None:
    """Rank 0 removes the file that the ranks met at, when none needs it any more."""
    if here and here.rank == 0 and (store := os.environ.get("REGROWTH_STORE")):
        shutil.rmtree(Path(store).parent, ignore_errors=True)
