"""The processes that do a job together: those that mpirun started, or this one alone."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from regrowth.errors import RegrowthError, RunFailed, UserError, need

T = TypeVar("T")


class Alone:
    """One process; what `MpiRanks` does with several."""

    rank, size = 0, 1

    def first(self, action: Callable[[], T]) -> T:
        """Do something on the first rank alone; all ranks get its result, or its error."""
        return action()

    def together(self, action: Callable[[], T]) -> T:
        """Do something on each rank; where one raises one of our errors, all raise it, when all have ended."""
        return action()


class MpiRanks(Alone):
    """The ranks of MPI's world.

    Raises:
        UserError: mpi4py is missing.
    """

    def __init__(self) -> None:
        self._mpi: Any = need("mpi4py.MPI", "starting with mpirun")
        self._world = self._mpi.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def first(self, action: Callable[[], T]) -> T:
        answer = _outcome(action) if self.rank == 0 else None
        self._wait()
        return _unwrap(self._world.bcast(answer, root=0))

    def together(self, action: Callable[[], T]) -> T:
        kind, value = _outcome(action)
        self._wait()
        for other in self._world.allgather((kind, value if kind != "ok" else None)):
            if other[0] != "ok":
                _unwrap(other)
        return value

    def on_this_host(self) -> tuple[int, int]:
        """(rank, ranks) among those of this host."""
        host = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        return host.Get_rank(), host.Get_size()

    def of_this_host(self, value: T) -> list[T]:
        """What each rank of this host gives."""
        return self._world.Split_type(self._mpi.COMM_TYPE_SHARED).allgather(value)

    def leave(self) -> None:
        """Part from the others, when they do so too."""
        self._wait()
        self._mpi.Finalize()

    def abort(self, code: int) -> None:
        """End all ranks at once, this one too."""
        self._world.Abort(code)

    def _wait(self) -> None:
        """For all ranks, without burning a core: MPI's own barrier spins."""
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(0.02)


def _outcome(action: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "ok", action()
    except UserError as error:
        return "user", str(error)
    except RegrowthError as error:
        return "failed", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"


def _unwrap(outcome: tuple[str, Any]) -> Any:
    kind, value = outcome
    if kind == "user":
        raise UserError(value)
    if kind == "failed":
        raise RunFailed(value)
    return value


def started_by_mpi() -> bool:
    """Whether mpirun started this process beside others."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1) > 1


def ranks() -> Alone:
    """Those that do a job together with this process."""
    return MpiRanks() if started_by_mpi() else Alone()
