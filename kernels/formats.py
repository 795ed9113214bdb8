"""Number formats as data, and rounding to them: the oracle that every faster kernel is held to.

Rounding to nearest even is done in fp32 without a table: adding 1.5 * 2^23 * step and taking it away again leaves a multiple of `step`, ties
to even, where `step` is the format's spacing at the value's binade. Exact for every fp32 input, denormals of the format included.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """A small floating-point format without infinities; values beyond `max` saturate, NaN stays NaN."""

    name: str
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number
    max: float
    bits: int


E2M1 = Format("e2m1", mantissa_bits=1, min_exponent=0, max=6.0, bits=4)
E4M3 = Format("e4m3", mantissa_bits=3, min_exponent=-6, max=448.0, bits=8)
E5M2 = Format("e5m2", mantissa_bits=2, min_exponent=-14, max=57344.0, bits=8)
FORMATS = {f.name: f for f in (E2M1, E4M3, E5M2)}

_EXPONENT_BITS = 0x7F800000


@torch.no_grad()
def round_to(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Round fp32 values to the nearest value of `format`, ties to even, saturating; a new fp32 tensor of x's shape."""
    x = x.float()
    # NaN survives clamp; the sign of zero survives copysign.
    clamped = x.clamp(-format.max, format.max)
    magnitude = clamped.abs().clamp_min_(2.0**format.min_exponent)
    binade = magnitude.view(torch.int32).bitwise_and_(_EXPONENT_BITS).view(torch.float32)
    magic = binade.mul_(1.5 * 2.0 ** (23 - format.mantissa_bits))
    rounded = clamped.add_(magic).sub_(magic)
    return torch.copysign(rounded, x, out=rounded)
