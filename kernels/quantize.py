"""Quantisation with scales per tensor, per row or per block: values and scales apart, or back in fp32 at once (emulation).

"Row" and "block" run along the last dim, which callers make the contracted dim of their GEMM: a row is then a token of an activation or an
output channel of a weight. scale = amax / format.max, so the largest value of each group is representable; amax = 0 gives scale 1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # whoever only reads configs, as launchers do, does without torch, which takes seconds to import
    import torch
    import torch.distributed as dist

Granularity = Literal["tensor", "row", "block"]


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
    block: int = 128  # values per scale, for granularity "block"

    def scales(self, x: "torch.Tensor", groups: "AmaxGroups | None" = None) -> "torch.Tensor":
        """fp32 scales, broadcastable against x grouped as in `_grouped`.

        Args:
            x: [..., n] fp32; a slice of an operand, if `groups` says so.
        """
        from regrowth.kernels.formats import FORMATS

        assert self.format is not None
        grouped = _grouped(x, self)
        if grouped.numel() == 0:  # an expert without tokens: its ranks' slices may have some
            amax = grouped.new_zeros(() if self.granularity == "tensor" else (*grouped.shape[:-1], 1))
        else:
            amax = grouped.abs().amax() if self.granularity == "tensor" else grouped.abs().amax(dim=-1, keepdim=True)
        group = None if groups is None else {"tensor": groups.tensor, "row": groups.row, "block": None}[self.granularity]
        if group is not None:
            import torch.distributed as dist

            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        scale = amax.float() / FORMATS[self.format].max
        return scale.where(scale > 0, 1.0)

    def quantize(self, x: "torch.Tensor", groups: "AmaxGroups | None" = None) -> "tuple[torch.Tensor, torch.Tensor]":
        """(values of the format held in fp32, scales); their product is `emulate(x)`.

        Raises:
            ValueError: granularity "block" and the last dim is not a multiple of the block.
        """
        from regrowth.kernels.formats import FORMATS, round_to

        assert self.format is not None
        scale = self.scales(x, groups)
        grouped = _grouped(x.float(), self)
        return round_to(grouped / scale, FORMATS[self.format]).reshape(x.shape), scale

    def emulate(self, x: "torch.Tensor", groups: "AmaxGroups | None" = None) -> "torch.Tensor":
        """Round x to the format and scale back: an fp32 tensor of x's shape whose values the narrow format can hold."""
        if self.format is None:
            return x
        values, scale = self.quantize(x, groups)
        return _grouped(values, self).mul_(scale).reshape(x.shape)


def _grouped(x: "torch.Tensor", quantizer: Quantizer) -> "torch.Tensor":
    if quantizer.granularity != "block":
        return x
    if x.shape[-1] % quantizer.block:
        raise ValueError(f"blocks of {quantizer.block} do not divide the contracted dim of {x.shape[-1]}; choose a block that does")
    return x.reshape(*x.shape[:-1], -1, quantizer.block)
