"""What a model is told about the ranks that it is split over. Alone, everything here is the identity, so a model is written once."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from regrowth.parallel.collectives import Group, all_gather
from regrowth.parallel.context_parallel import local_positions
from regrowth.parallel.tensor_parallel import ALONE, TensorParallel


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share a sequence."""

    group: Group = None

    def gather(self, x_BT: torch.Tensor) -> torch.Tensor:
        """[B, T / cp, ...] of every rank as [B, T, ...] in the sequence's order; no gradient."""
        if self.group is None:
            return x_BT
        size = self.group.size()
        order = torch.cat([local_positions(x_BT.shape[1] * size, rank, size) for rank in range(size)])
        gathered = all_gather(x_BT, 1, self.group)
        return torch.empty_like(gathered).index_copy_(1, order.to(x_BT.device), gathered)

    def part(self, x_BT: torch.Tensor) -> torch.Tensor:
        """This rank's part of what `gather` gives."""
        if self.group is None:
            return x_BT
        return x_BT[:, local_positions(x_BT.shape[1], self.group.rank(), self.group.size()).to(x_BT.device)]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; no gradient."""
        if self.group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x


class AuxiliaryLosses:
    """Losses that arise within a model are not handed through it (through pipeline stages, recomputation): their gradient is injected on the spot."""

    def __init__(self, copies: int = 1) -> None:
        self.scale = 1.0  # what the main loss is multiplied by before its backward pass; the engine sets it
        self.copies = copies  # ranks that compute the same loss and whose gradients are summed

    def inject(self, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """x as it is; in the backward pass `scale` times the gradient of the scalar `loss` is added to what it depends on."""
        return _Inject.apply(x, loss, self.scale / self.copies)  # pyright: ignore[reportReturnType]


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grads[0], torch.full_like(ctx.like, ctx.scale), None


@dataclass(frozen=True)
class ModelParallel:
    """Handed to a model by its engine."""

    tp: TensorParallel = ALONE
    cp: ContextParallel = ContextParallel()
    ep: Group = None
    sequence: Group = None  # cp x tp: all that share a micro-batch
    auxiliary: AuxiliaryLosses = field(default_factory=AuxiliaryLosses)
