"""Quantisation with scales per tensor, per row, block or tile: values and scales apart, or back in fp32 at once (emulation).

"Row" and "block" run along the last dim, which callers make the contracted dim of their GEMM: a row is then a token of an activation or an
output channel of a weight. A "tile" is block x block of the last two dims.

A group of zeros has scale 1. One with a NaN or an infinity becomes NaN as a whole, with every other group that its scale depends on ("two_level": the tensor's): a gradient
that overflowed is not to look like one that did not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # whoever only reads configs, as launchers do, does without torch, which takes seconds to import
    import torch
    import torch.distributed as dist

Granularity = Literal["tensor", "row", "block", "tile"]
# "full": amax / format.max in fp32, so that the largest value of each group is held. As powers of two (E8M0): "floor", 2^(floor(log2 amax) - floor(log2 max)), the rule of
# the MX standard, under which values up to a third above the largest saturate; "ceil", 2^ceil(log2(amax / max)), under which none does. "two_level": E4M3 relative to one fp32
# scale of the whole tensor, amax / (448 max) (NVFP4, arXiv 2509.25149), never below E4M3's smallest number. "rms": the power of two at or below the scale that is best for normal
# values of the group's standard deviation, clipped beyond it (QuEST, arXiv 2502.05003; Quartet, arXiv 2505.14669). "delayed": as "full" times 2^margin, from the largest amax of the
# last `history` steps (`tables.py`); values beyond it saturate.
Scale = Literal["full", "floor", "ceil", "two_level", "rms", "delayed"]
Rounding = Literal["nearest", "stochastic"]
# The largest value of E2M1 stands for so many standard deviations where the squared error of a normal variable is smallest.
_BEST_CLIP = {"e2m1": 2.92247856}


@dataclass(frozen=True)
class AmaxGroups:
    """The ranks that hold the other slices of an operand: the largest value of a scale's group is the largest over all of them.

    A scale taken from a slice alone is off by 15 to 20% where tensor parallelism cuts the contracted dim. Blocks are never shared, because a
    block never straddles a cut.
    """

    row: "dist.ProcessGroup | None" = None  # those that cut the last (contracted) dim
    tensor: "dist.ProcessGroup | None" = None  # those that cut any dim


@dataclass(frozen=True)
class Quantizer:
    """How one operand of a GEMM is rounded. `format` None leaves it as it is."""

    # Unknown keys in configs are errors here too.
    __pydantic_config__ = {"extra": "forbid"}

    format: Literal["e2m1", "e4m3", "e5m2"] | None = None
    granularity: Granularity = "row"
    block: int = 128  # values per scale, for granularity "block"; along each of two dims for "tile"
    scale: Scale = "full"
    rounding: Rounding = "nearest"
    shrink: float = 1.0  # values are multiplied by it before they are rounded: 3/4 keeps those that the floor rule would clip, without which the mean is wrong
    history: int = 16  # steps that a delayed scale looks back on
    margin: int = 0  # powers of two that a delayed scale leaves free above them
    # Values outside the quantiles 1 - a and a are clamped, and what is cut off is kept wide beside them (arXiv 2501.17116).
    outliers: float | None = None

    def __post_init__(self) -> None:
        if self.scale == "rms" and (self.granularity not in ("block", "tile") or self.format not in _BEST_CLIP):
            raise ValueError('scale = "rms" is defined for format = "e2m1" and granularity = "block" or "tile"')
        if self.scale == "delayed" and (self.granularity != "tensor" or self.history < 1):
            raise ValueError('scale = "delayed" is defined for granularity = "tensor" and a history of at least one step')
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink = {self.shrink} is not above 0 and at most 1")
        if self.outliers is not None and not 0.5 < self.outliers < 1:
            raise ValueError(f"outliers = {self.outliers} is no upper quantile: between 0.5 and 1, as 0.99")

    def scales(self, x: "torch.Tensor", groups: "AmaxGroups | None" = None, amax: "torch.Tensor | None" = None) -> "torch.Tensor":
        """fp32 scales, broadcastable against x grouped as in `_grouped`.

        Args:
            x: [..., n] fp32; a slice of an operand, if `groups` says so.
            amax: fp32 scalar taken instead of x's own ("delayed").
        """
        assert self.format is not None
        if self.scale == "rms":
            return self._rms_scale(_reduced(_grouped(x, self), (-1,) if self.granularity == "block" else (-3, -1), _variance).sqrt_())
        return self._scale_of(self.amax(x, groups) if amax is None else amax, groups)

    def amax(self, x: "torch.Tensor", groups: "AmaxGroups | None" = None) -> "torch.Tensor":
        """fp32, the largest magnitude of each group, in the shape of `scales`."""
        grouped, dims = _grouped(x, self), {"tensor": None, "row": (-1,), "block": (-1,), "tile": (-3, -1)}[self.granularity]
        if dims is None:
            amax = _largest(grouped) if grouped.numel() else grouped.new_zeros(())
        elif grouped.numel():
            amax = _reduced(grouped, dims, _largest)
        else:  # an expert without tokens: its ranks' slices may have some
            amax = grouped.new_zeros((*grouped.shape[:-1], 1))
        _reduce(amax, None if groups is None else {"tensor": groups.tensor, "row": groups.row}.get(self.granularity))
        return amax.float()

    def _rms_scale(self, deviation: "torch.Tensor") -> "torch.Tensor":
        from regrowth.kernels.formats import FORMATS, decode_power, encode_power

        assert self.format is not None
        scale = decode_power(encode_power(deviation * (_BEST_CLIP[self.format] / FORMATS[self.format].max)))
        return scale.where(deviation != 0, 1.0)

    def _scale_of(self, amax: "torch.Tensor", groups: "AmaxGroups | None") -> "torch.Tensor":
        from regrowth.kernels.formats import E4M3, FORMATS, decode_power, encode_power, round_to

        assert self.format is not None
        most = FORMATS[self.format].max
        if self.scale in ("full", "delayed"):
            scale = over(amax * (2.0**self.margin if self.scale == "delayed" else 1.0), most)
            return (scale + (amax - amax)).where(scale != 0, 1.0)  # inf - inf is NaN
        if self.scale == "two_level":
            whole = amax.amax() if amax.numel() else amax.new_zeros(())
            _reduce(whole, None if groups is None else groups.tensor)
            whole = over(whole, most * E4M3.max)
            whole = whole.where(whole != 0, 1.0)
            smallest = 2.0 ** (E4M3.min_exponent - E4M3.mantissa_bits)
            scale = round_to(over(amax, most) / whole, E4M3).clamp_min(smallest) * whole
            scale = scale.where((amax != 0) | whole.isnan() | whole.isinf(), 1.0)
            return scale.where(scale != 0, 1.0)  # underflown: the values become zeros
        if self.scale == "floor":
            largest_power = 2.0 ** (int(most).bit_length() - 1)
            scale = decode_power(encode_power(amax, over=largest_power))
        else:
            scale = decode_power(encode_power(amax, up=True, over=most))
        return scale.where(amax != 0, 1.0)

    def quantize(
        self,
        x: "torch.Tensor",
        groups: "AmaxGroups | None" = None,
        random: "torch.Tensor | None" = None,
        amax: "torch.Tensor | None" = None,
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """(values of the format held in fp32, scales); their product, over `shrink`, is `emulate(x)` without outliers.

        Args:
            random: integers of x's shape, for stochastic rounding (`rounding_bits`).
            amax: as in `scales`.

        Raises:
            ValueError: a block or a tile does not divide its dims; stochastic rounding without random bits.
        """
        from regrowth.kernels.formats import FORMATS, divide_and_round

        assert self.format is not None
        if self.rounding == "stochastic" and random is None:
            raise ValueError('rounding = "stochastic" needs random bits')
        scale = self.scales(x, groups, amax)
        bits = None if random is None or self.rounding == "nearest" else _grouped(random, self)
        power = self.scale in ("floor", "ceil", "rms")
        return divide_and_round(_grouped(x.float(), self), scale, FORMATS[self.format], self.shrink, bits, power).reshape(x.shape), scale

    def emulate(
        self,
        x: "torch.Tensor",
        groups: "AmaxGroups | None" = None,
        random: "torch.Tensor | None" = None,
        amax: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """Round x to the format and scale back: an fp32 tensor of x's shape whose values the narrow format can hold, but for outliers' remainders."""
        if self.format is None:
            return x
        if self.outliers is not None:
            from regrowth.kernels.outliers import clamp_outliers

            inside, beyond = clamp_outliers(x.float(), self.outliers, None if groups is None else groups.tensor)
            return replace(self, outliers=None).emulate(inside, groups, random, amax) + beyond
        return self.restore(*self.quantize(x, groups, random, amax))

    def restore(self, values: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
        """fp32: values of the format times their scales. `values` is written over."""
        from regrowth.kernels.formats import pieces

        grouped = _grouped(values, self)
        for part, by in pieces(grouped, scale):
            part.mul_(by)
            if self.shrink != 1.0:
                part.div_(_number(self.shrink, part))
        return grouped.reshape(values.shape)

    def in_units_of(self, scale: "torch.Tensor", x: "torch.Tensor") -> "torch.Tensor":
        """x over its scales."""
        return (_grouped(x, self) / scale).reshape(x.shape)

    def holds(self, x: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
        """bool, x's shape: what lies within the format's range under a scale, and is not clipped."""
        from regrowth.kernels.formats import FORMATS

        assert self.format is not None
        return (_grouped(x, self).abs() < scale * FORMATS[self.format].max).reshape(x.shape)


def _reduced(x: "torch.Tensor", dims: tuple[int, ...], reduce: Callable[..., "torch.Tensor"]) -> "torch.Tensor":
    """A reduction that keeps its dims, taken and laid out in the order that x has in memory: of a transpose it would take ten times as long."""
    if x.is_contiguous():
        return reduce(x, dims)
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    there = reduce(x.permute(order), tuple(order.index(dim % x.dim()) for dim in dims))
    return there.permute([order.index(dim) for dim in range(x.dim())])


def _largest(x: "torch.Tensor", dims: tuple[int, ...] = ()) -> "torch.Tensor":
    """The largest magnitude, of all or along dims that are kept; two reductions and no tensor of magnitudes between."""
    least = x.amin(dims, keepdim=bool(dims))
    return x.amax(dims, keepdim=bool(dims)).maximum(least.neg_()).abs_()  # the sign of zero and NaN


def _variance(x: "torch.Tensor", dims: tuple[int, ...]) -> "torch.Tensor":
    """fp32, along dims that are kept; in fp64 until it is rounded once, so that the order of the sums does not matter."""
    centred = x.double()
    centred -= centred.mean(dims, keepdim=True)
    return centred.square_().mean(dims, keepdim=True).float()


def over(x: "torch.Tensor", divisor: float) -> "torch.Tensor":
    """x / divisor, rounded once: by a plain number torch divides on a CPU, and on a GPU multiplies by the number's inverse, whose last bit may be another."""
    return x / _number(divisor, x)


def _number(value: float, like: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.full((), value, dtype=like.dtype, device=like.device)


def _reduce(amax: "torch.Tensor", group: "dist.ProcessGroup | None") -> None:
    """The largest over the ranks that hold the other slices."""
    if group is not None:
        import torch.distributed as dist

        amax.nan_to_num_(math.inf, math.inf)  # the larger of NaN and a number depends on the rank that has it
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)


def _grouped(x: "torch.Tensor", quantizer: Quantizer) -> "torch.Tensor":
    """x with dims of its own for blocks [..., n / block, block] or tiles [..., m / block, block, n / block, block]."""
    if quantizer.granularity not in ("block", "tile"):
        return x
    cut = x.shape[-1:] if quantizer.granularity == "block" else x.shape[-2:]
    for size in cut:
        if size % quantizer.block:
            what = "contracted dim" if quantizer.granularity == "block" else "dim"
            raise ValueError(f"{quantizer.granularity}s of {quantizer.block} do not divide the {what} of {size}; choose a block that does")
    apart = [part for size in cut for part in (size // quantizer.block, quantizer.block)]
    return x.reshape(*x.shape[: -len(cut)], *apart)
