"""Decisions that all ranks must take alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from regrowth.errors import RegrowthError, RunFailed, UserError

T = TypeVar("T")


def on_first_rank(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call on rank 0 and give every rank its result; if it raises a RegrowthError there, that error is raised everywhere.

    Args:
        group: of all ranks, for callers in a thread of their own; None for the default group.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [function(), None]
        except RegrowthError as error:
            outcome = [None, error]
        except Exception as error:
            outcome = [None, RunFailed(f"{type(error).__name__}: {error}")]
            dist.broadcast_object_list(outcome, src=0, group=group)
            raise
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank(function: Callable[[], T]) -> T:
    """Call on each rank; if it raises a RegrowthError on any, the first such error is raised on all of them, with its rank."""
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    try:
        outcome[0] = function()
    except RegrowthError as error:
        outcome[1] = error
    except Exception as error:  # the others must not wait for this rank
        outcome[1] = RunFailed(f"{type(error).__name__}: {error}")
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, outcome[1])
    for rank, error in enumerate(everywhere):
        if error is not None:
            raise type(error)(f"rank {rank}: {error}")
    return outcome[0]


def check_same(values: dict[str, str]) -> None:
    """All ranks must have come with the same values (hashes of config and data, versions).

    Raises:
        UserError: on every rank, naming what differs and on which ranks.
    """
    if not dist.is_initialized():
        return
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, values)
    for name, expected in everywhere[0].items():
        if others := [rank for rank, theirs in enumerate(everywhere) if theirs.get(name) != expected]:
            told = ", ".join(map(str, others[:8])) + (" and others" if len(others) > 8 else "")
            raise UserError(f"rank {told}: {name} is {everywhere[others[0]].get(name)!r}, on rank 0 it is {expected!r}. All ranks must run the same "
                            "code on the same config and data; bring them to one state and start again.")  # fmt: skip


def set_timeout(seconds: float) -> None:
    """How long a rank waits for the others in collectives of the default group that begin from now on."""
    if dist.is_initialized():
        world: Any = dist.group.WORLD
        world.set_timeout(timedelta(seconds=seconds))


@contextmanager
def patience(seconds_afterwards: float) -> Iterator[None]:
    """A day's patience inside, for what rank 0 does alone on files of any size; if it dies, the others hear of it at once all the same."""
    set_timeout(24 * 3600)
    try:
        yield
    finally:
        set_timeout(seconds_afterwards)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
