"""Decisions that all ranks must take alike."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from regrowth.errors import RegrowthError, RunFailed

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """Call on rank 0 and give every rank its result; if it raises a RegrowthError there, that error is raised everywhere."""
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
            dist.broadcast_object_list(outcome, src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
