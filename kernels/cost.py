"""What a precision recipe would cost where narrow matrix products are faster: FLOPs over speed, and nothing else.

An upper bound on the gain, as papers' cost tables reckon it: rounding, transforms, scales and memory are free here. Without kernels for a format
nothing is faster, so no speed is assumed unless it is given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from regrowth.kernels.recipe import GemmPrecision, LinearPrecision, PrecisionRecipe

# Times the rate of 16 bit, as matrix units that have all of them publish it, and as arXiv 2502.11458 assumes.
SPEED = {"e2m1": 4.0, "e4m3": 2.0, "e5m2": 2.0}
_BITS = {"e2m1": 4, "e4m3": 8, "e5m2": 8, None: 16}


class DecoderSize(Protocol):
    """What the shares of a model's FLOPs depend on."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    head_dim: int

    @property
    def kv_width(self) -> int: ...

    def train_flops_per_token(self, sequence_length: int) -> int: ...


@dataclass(frozen=True)
class FlopShares:
    """Shares of a step's matrix FLOPs, which sum to 1; the same in the forward pass and in either gradient."""

    attention: float  # projections of q, k, v and output
    ffn: float
    wide: float  # attention core and head, which no recipe makes narrow


@dataclass(frozen=True)
class PassTimes:
    """Times of the three passes, each relative to the same pass in 16 bit."""

    forward: float
    dgrad: float
    wgrad: float

    @property
    def step(self) -> float:
        """Of all three, which have equal FLOPs."""
        return (self.forward + self.dgrad + self.wgrad) / 3


def flop_shares(model: DecoderSize, sequence_length: int) -> FlopShares:
    """The shares of a decoder, by its own count of FLOPs (full attention, the head counted; routers of experts go with the FFN)."""
    attended = model.heads * model.head_dim
    forward = model.train_flops_per_token(sequence_length) / 3
    attention = model.layers * 2 * model.width * (2 * attended + 2 * model.kv_width) / forward
    wide = (model.layers * 4 * sequence_length * attended + 2 * model.vocabulary * model.width) / forward
    return FlopShares(attention, 1 - attention - wide, wide)


def gemm_time(gemm: GemmPrecision, speed: Mapping[str, float]) -> float:
    """Time of a product relative to 16 bit: it runs at the speed of its wider operand.

    Args:
        speed: times the rate of 16 bit, by format; 1 for those that are not named.
    """
    bits = max(_BITS[gemm.a.format], _BITS[gemm.b.format])
    return 1 / min(speed.get(f, 1.0) if f else 1.0 for f in (gemm.a.format, gemm.b.format) if _BITS[f] == bits)


def linear_times(precision: LinearPrecision, speed: Mapping[str, float]) -> PassTimes:
    """The three products of one kind of linear."""
    return PassTimes(gemm_time(precision.forward, speed), gemm_time(precision.dgrad, speed), gemm_time(precision.wgrad, speed))


def recipe_times(recipe: PrecisionRecipe, shares: FlopShares, speed: Mapping[str, float], layers: int) -> PassTimes:
    """The three passes of a whole model of so many layers while the recipe is in force; its first and last wide blocks count, the patterns of `recipe.wide` do not."""
    attention, ffn = linear_times(recipe.attention, speed), linear_times(recipe.ffn, speed)
    wide_blocks = sum(recipe.in_wide_block(layer, layers) for layer in range(layers)) / layers

    def of(a: float, f: float) -> float:
        narrow = shares.attention * a + shares.ffn * f
        return shares.wide + (1 - wide_blocks) * narrow + wide_blocks * (shares.attention + shares.ffn)

    return PassTimes(of(attention.forward, ffn.forward), of(attention.dgrad, ffn.dgrad), of(attention.wgrad, ffn.wgrad))
