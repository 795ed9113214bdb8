"""How a larger tensor is made of smaller ones: each dim of the target picks, scales and adds entries of a source's dim.

An operator gives, for each target tensor, a list of terms that are added. The same description says what happens to the optimizer's moments, because
each entry knows by which factor its gradient differs from its source's: first moments take the factor, second moments its square.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from regrowth.pretrain.growth.names import TensorName

if TYPE_CHECKING:  # configs hold operators, and are read where torch is not wanted
    import torch

Read = Callable[[TensorName], "torch.Tensor"]


@dataclass(frozen=True)
class Axis:
    """One dim: target entry i is scale[i] * source[index[i]]; where the index is -1 it gets nothing.

    Args:
        index: int64 [n].
        scale: float64 [n].
        gradient: the target's gradient as a multiple of its source's.
    """

    index: np.ndarray
    scale: np.ndarray
    gradient: float = 1.0

    def apply(self, tensor: "torch.Tensor", dim: int, factor: np.ndarray) -> "torch.Tensor":
        """The entries that are picked along a dim, times `factor` [n]."""
        import torch

        picked = tensor.index_select(dim, torch.from_numpy(np.maximum(self.index, 0)))
        factor = np.where(self.index >= 0, factor, 0.0)
        if (factor == 1).all():
            return picked
        return picked.mul_(torch.from_numpy(factor).to(tensor.dtype).view([-1 if d == dim else 1 for d in range(tensor.ndim)]))


def pick(index: Sequence[int] | np.ndarray, scale: float | np.ndarray = 1.0, gradient: float = 1.0) -> Axis:
    """Entry i of the target is entry index[i] of the source times `scale`."""
    places = np.asarray(index, dtype=np.int64)
    return Axis(places, np.broadcast_to(np.asarray(scale, dtype=np.float64), places.shape), gradient)


def tile(size: int, times: int, scale: float = 1.0, gradient: float = 1.0) -> Axis:
    """The whole source `times` over, end to end."""
    return pick(np.tile(np.arange(size), times), scale, gradient)


@dataclass(frozen=True)
class Noise:
    """Normal noise of `relative` times the standard deviation of a source tensor, with a shape of its own."""

    relative: float
    of: TensorName
    shape: tuple[int, ...]
    key: str  # with the seed: what is drawn


@dataclass(frozen=True)
class Fresh:
    """Normal values as at a model's start."""

    std: float
    shape: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Term:
    """A part of a target tensor: what it is made of, and how each dim of it is. A dim without an axis is taken as it is.

    Args:
        new_dim: whether the source gets a first dim of size 1 before the axes are applied.
        scale, gradient: factors of the whole.
    """

    source: TensorName | Noise | Fresh
    axes: dict[int, Axis] = field(default_factory=dict)
    new_dim: bool = False
    scale: float = 1.0
    gradient: float = 1.0

    def weights(self, read: Read, seed: int) -> "torch.Tensor":
        """This part of the target's values."""
        values = self._source(read, seed)
        for dim, axis in self.axes.items():
            values = axis.apply(values, dim, axis.scale)
        return values if self.scale == 1.0 else values * self.scale

    def moments(self, read: Read, square: bool) -> "torch.Tensor | None":
        """This part of the target's first or (`square`) second moments; None for what was drawn."""
        if not isinstance(self.source, TensorName):
            return None
        values, power = self._lifted(read(self.source)), 2 if square else 1
        for dim, axis in self.axes.items():
            values = axis.apply(values, dim, np.full(len(axis.scale), axis.gradient**power))
        return values if self.gradient == 1.0 else values * self.gradient**power

    def _source(self, read: Read, seed: int) -> "torch.Tensor":
        if isinstance(self.source, TensorName):
            return self._lifted(read(self.source))
        import torch

        from regrowth.kernels.random import normal, random_key

        count = math.prod(self.source.shape)
        drawn = normal(random_key(seed, "growth", name=self.source.key), torch.arange(count)).view(self.source.shape)
        if isinstance(self.source, Fresh):
            return (drawn * self.source.std).float()
        like = read(self.source.of)
        return (drawn * (self.source.relative * like.double().std().item())).to(like.dtype)

    def _lifted(self, tensor: "torch.Tensor") -> "torch.Tensor":
        return tensor.unsqueeze(0) if self.new_dim else tensor
