"""Number formats as data, and rounding to them: the oracle that every faster kernel is held to.

Rounding to nearest even is done in fp32 without a table: adding 1.5 * 2^23 * step and taking it away again leaves a multiple of `step`, ties
to even, where `step` is the format's spacing at the value's binade. Exact for every fp32 input, denormals of the format included.
"""

import math
import struct
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

_EXPONENT_BITS, _NAN_BITS = 0x7F800000, 0x7FC00000
_PIECE = 1 << 16  # values a thread


@torch.no_grad()
def round_to(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Round fp32 values to the nearest value of `format`, ties to even, saturating; a new fp32 tensor of x's shape."""
    x = x.float()
    out = torch.empty_like(x)
    for part, to in pieces(x, out):
        _round(part, format, to)
    return out


@torch.no_grad()
def divide_and_round(
    x: torch.Tensor, scale: torch.Tensor, format: Format, shrink: float = 1.0, random: torch.Tensor | None = None, power: bool = False
) -> torch.Tensor:
    """x / scale * shrink, rounded as by `round_to`, or as by `round_stochastic` where there are random bits; in x's strides.

    Args:
        scale: fp32, one number or of as many dims as x.
        power: whether scales are powers of two: then x is multiplied by their inverses, which is as exact and takes less time.
    """
    x = x.float()
    scale = scale.reciprocal() if power else scale
    out = torch.empty_like(x)
    for part, by, to, *bits in pieces(x, scale, out, *([] if random is None else [random])):
        torch.mul(part, by, out=to) if power else torch.div(part, by, out=to)
        if shrink != 1.0:
            to.mul_(shrink)
        _round_stochastic(to, format, bits[0], to) if bits else _round(to, format, to)
    return out


def pieces(x: torch.Tensor, *others: torch.Tensor, whole: int = -1) -> list[tuple[torch.Tensor, ...]]:
    """x cut along the dim that is slowest in memory, so that passes that follow each other find a piece in the cache of a core; whole where that is no gain.

    Args:
        others: cut alike, where they have more than one place along that dim.
        whole: a dim that is not cut.
    """
    size = _PIECE * torch.get_num_threads()
    if x.device.type != "cpu" or x.numel() <= size or torch.compiler.is_compiling():
        return [(x, *others)]
    dim = max(range(x.dim()), key=lambda d: (x.stride(d), -d) if x.shape[d] > 1 and d != whole else (-1, 0))
    length = x.shape[dim]
    step = max(1, size * length // x.numel())
    cuts = [t.split(step, dim) if t.dim() and t.shape[dim] > 1 else [t] * -(-length // step) for t in (x, *others)]
    return list(zip(*cuts, strict=True))


def _round(x: torch.Tensor, format: Format, out: torch.Tensor) -> torch.Tensor:
    """Into `out`, which may be x."""
    largest_power = 2.0 ** math.floor(math.log2(format.max))
    binade = x.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32).clamp_(2.0**format.min_exponent, largest_power)
    magic = 1.5 * 2.0 ** (23 - format.mantissa_bits)  # times the binade: exact
    rounded = torch.add(x, binade, alpha=magic).sub_(binade, alpha=magic).clamp_(-format.max, format.max)
    # NaN survives the sum and clamp; the sign of zero survives copysign.
    return torch.copysign(rounded, x, out=out)


@torch.no_grad()
def round_stochastic(x: torch.Tensor, format: Format, random: torch.Tensor) -> torch.Tensor:
    """Round fp32 values to one of their two neighbours in `format`, up with a chance that makes the mean right; a new fp32 tensor of x's shape.

    In integers: random bits are added to those that the format drops, and what is left of these is cut off. So the same bits come out on every device.
    The chance is resolved to 2^-(23 - mantissa bits). What a format holds stays as it is; values beyond its largest saturate, NaN stays NaN.

    Args:
        random: integers of x's shape, of which the low bits are used (`rounding_bits`).
    """
    x = x.float()
    out = torch.empty_like(x)
    for part, bits, to in pieces(x, random, out):
        _round_stochastic(part, format, bits, to)
    return out


def _round_stochastic(x: torch.Tensor, format: Format, random: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Into `out`, which may be x."""
    smallest = int.from_bytes(struct.pack(">f", 2.0**format.min_exponent))
    dropped = (1 << (23 - format.mantissa_bits)) - 1
    magnitude = x.abs().clamp_(max=format.max)
    # Below the smallest normal number the spacing is that of its binade, into which adding it moves a value. Bits of magnitudes, as integers, are in their order.
    offset = magnitude.view(torch.int32).sub(smallest).bitwise_right_shift_(31).bitwise_and_(smallest).view(torch.float32)
    bits = magnitude.add_(offset).view(torch.int32)
    # A NaN with its first bit alone stays one, whatever is added to the bits that are dropped.
    bits.clamp_(max=_NAN_BITS).add_((random & dropped).to(torch.int32)).bitwise_and_(~dropped)
    return torch.copysign(bits.view(torch.float32).sub_(offset), x, out=out)


@torch.no_grad()
def encode(values: torch.Tensor, format: Format) -> torch.Tensor:
    """The codes (uint8, x's shape) of fp32 values that `format` holds: sign, exponent, mantissa. NaN is the code with all bits but the sign's set.

    E2M1 has no NaN.

    Raises:
        ValueError: a NaN, in a format without one.
    """
    values = values.float()
    nan = values.isnan()
    if format.bits < 8 and bool(nan.any()):
        raise ValueError(f"{format.name} has no code for NaN")
    magnitude = torch.where(nan, 0.0, values.abs())
    smallest = 2.0**format.min_exponent
    bits = magnitude.view(torch.int32)
    normal = ((bits >> (23 - format.mantissa_bits)) - ((format.min_exponent + 126) << format.mantissa_bits)).to(torch.int32)
    small = (magnitude * (2.0**format.mantissa_bits / smallest)).to(torch.int32)  # exact: whole multiples of the smallest number
    codes = torch.where(magnitude < smallest, small, normal)
    codes = torch.where(nan, (1 << (format.bits - 1)) - 1, codes)
    negative = torch.signbit(values).to(torch.int32) << (format.bits - 1)
    return (codes | negative).to(torch.uint8)


@torch.no_grad()
def decode(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """The fp32 values of codes (uint8). Infinities of E5M2, which rounding never makes, are infinities again."""
    codes = codes.to(torch.int32)
    magnitude = codes & ((1 << (format.bits - 1)) - 1)
    exponent, mantissa = magnitude >> format.mantissa_bits, magnitude & ((1 << format.mantissa_bits) - 1)
    step = 2.0 ** (format.min_exponent - format.mantissa_bits)
    small = mantissa.float() * step
    normal = (((exponent + (format.min_exponent + 126)) << 23) | (mantissa << (23 - format.mantissa_bits))).view(torch.float32)
    values = torch.where(exponent == 0, small, normal)
    if format.bits == 8:
        values = torch.where(values > format.max, torch.nan, values)
        if format is E5M2:
            values = torch.where(magnitude == 0x7C, torch.inf, values)
    return torch.where((codes >> (format.bits - 1)) & 1 == 1, -values, values)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits [..., n] as bytes [..., n / 2], the first of a pair in the low half, as torch's float4_e2m1fn_x2 has them.

    Raises:
        ValueError: n is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes make a byte; the last dim of {codes.shape[-1]} is odd")
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes [..., 2 n] of packed bytes [..., n]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


SCALE_BIAS, SCALE_NAN = 127, 255  # of E8M0: powers of two without a sign, and a NaN


@torch.no_grad()
def encode_power(scales: torch.Tensor, up: bool = False, over: float = 1.0) -> torch.Tensor:
    """E8M0 codes (uint8) of fp32 `scales` / `over`: the power of two at or below each, with `up` at or above it, within 2^-127 and 2^127. NaN, infinities and values
    below 0 have the code of NaN. The quotient is not taken: it may be so small that fp32 rounds it, and up to a power of two that it is below."""
    scales = scales.float()
    # Bits of floats, as integers, are their logarithms to base two but for the bend within a binade; so the difference's whole part is the power.
    over_bits = int.from_bytes(struct.pack(">f", over))
    power = scales.view(torch.int32) - (over_bits - up * (2**23 - 1))
    codes = power.bitwise_right_shift_(23).add_(SCALE_BIAS).clamp_(0, 2 * SCALE_BIAS)
    codes = torch.where(scales > over * 2.0**-SCALE_BIAS, codes, 0)  # what fp32 holds as denormals bends otherwise
    return torch.where((scales >= 0) & (scales < math.inf), codes, SCALE_NAN).to(torch.uint8)


@torch.no_grad()
def decode_power(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 powers of two of E8M0 codes (uint8)."""
    bits = codes.to(torch.int32).bitwise_left_shift(23).clamp_min_(1 << 22)  # 2^-127 is a denormal
    return torch.where(codes == SCALE_NAN, torch.nan, bits.view(torch.float32))
