"""What a program does with one tile [R, C] of a tensor in its registers: transform it, find its groups' scales, round it, store codes and scales.

Groups run along the last dim; for an operand whose groups run down the columns the same functions take the transposed tile, so that one load of a tile serves both
operands. Largest values are compared as bits: those of magnitudes are ordered as the magnitudes are, with NaN above infinity, so that no NaN is lost in a maximum.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# (kernels are in a language that only looks like Python)

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from regrowth.kernels.formats import E4M3, FORMATS, Format
from regrowth.kernels.quantize import _BEST_CLIP, Quantizer
from regrowth.kernels.triton_formats import (
    INFINITY,
    MAGNITUDE,
    bits_of,
    decode,
    decode_power,
    float_of,
    full_scale,
    nearest_code,
    power_scale,
    random_bits,
    rms_scale,
    stochastic_code,
    two_level_scale,
    whole_scale,
)


@dataclass(frozen=True)
class Plan:
    """A quantiser, and the transform before it, as compile-time constants of a kernel."""

    format: Format
    max_bits: int  # of the format's largest value in fp32
    granularity: str
    block: int
    scale: str
    most: float  # what an amax is divided by
    most_bits: int  # of that in fp32
    clip: float  # of the rms rule
    stochastic: bool
    shrink: float
    hadamard: int  # 0 for none
    norm: float
    signed: bool
    e4m3: Format = E4M3
    e4m3_max_bits: int = 0
    rows_in_tile: bool = False  # tiles are as wide as the tensor

    @property
    def least_columns(self) -> int:
        """A launch tile's columns are a multiple of it."""
        return max(self.hadamard, 2, self.block if self.granularity in ("block", "tile") else 2)

    @property
    def least_rows(self) -> int:
        """A launch tile's rows are a multiple of it."""
        return self.block if self.granularity == "tile" else 1

    @property
    def needs_amax(self) -> bool:
        """Whether a first pass over the tensor has to find the largest values of groups that no tile holds whole."""
        return self.granularity == "tensor" or self.scale == "two_level" or (self.granularity == "row" and not self.rows_in_tile)


def plan_of(quantizer: Quantizer, hadamard: int | None = None, signed: bool = False) -> Plan:
    """The constants for a quantiser.

    Raises:
        ValueError: blocks that are no power of two.
    """
    assert quantizer.format is not None
    format, block = FORMATS[quantizer.format], quantizer.block
    if quantizer.granularity in ("block", "tile") and (block < 2 or block & (block - 1)):
        raise ValueError(
            f"the Triton kernels take blocks that are powers of two, not {block}; quantise by the reference, or choose another block"
        )
    if quantizer.scale == "delayed":
        raise ValueError('the Triton kernels take scales from the tensor at hand, not scale = "delayed"; quantise by the reference')
    most = 2.0 ** math.floor(math.log2(format.max)) if quantizer.scale == "floor" else format.max
    return Plan(
        format=format,
        max_bits=_bits(format.max),
        granularity=quantizer.granularity,
        block=block if quantizer.granularity in ("block", "tile") else 0,  # one kernel for all whose block means nothing
        scale=quantizer.scale,
        most=most,
        most_bits=_bits(most),
        clip=_BEST_CLIP[quantizer.format] / format.max if quantizer.scale == "rms" else 0.0,
        stochastic=quantizer.rounding == "stochastic",
        shrink=quantizer.shrink,
        hadamard=hadamard or 0,
        norm=hadamard**-0.5 if hadamard else 1.0,
        signed=signed,
        e4m3_max_bits=_bits(E4M3.max),
    )


def scale_matrix(shape: tuple[int, ...], quantizer: Quantizer) -> tuple[int, int]:
    """How many groups a matrix of `shape` has, down and across."""
    rows, columns = shape
    if quantizer.granularity == "tensor":
        return 1, 1
    down = rows // quantizer.block if quantizer.granularity == "tile" else rows
    return down, 1 if quantizer.granularity == "row" else columns // quantizer.block


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


@triton.jit
def transform(x, signs, PLAN: tl.constexpr):
    """`hadamard.hadamard` of a tile [R, C] fp32: butterflies in its order of strides, so that no bit differs. Sums and differences alone: there is nothing to fuse."""
    if PLAN.hadamard:
        R: tl.constexpr = x.shape[0]
        C: tl.constexpr = x.shape[1]
        SIZE: tl.constexpr = PLAN.hadamard
        if PLAN.signed:
            sign = tl.load(signs + tl.arange(0, SIZE))
            x = tl.reshape(tl.reshape(x, [R, C // SIZE, SIZE]) * sign[None, None, :], [R, C])
        for i in tl.static_range(7):
            if (1 << i) < SIZE:
                pairs = tl.permute(tl.reshape(x, [R, C // (2 << i), 2, 1 << i]), [0, 1, 3, 2])
                first, second = tl.split(pairs)
                x = tl.reshape(tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2]), [R, C])
        x = x * PLAN.norm
    return x


@triton.jit
def largest(bits, GROUP_R: tl.constexpr, GROUP_C: tl.constexpr):
    """The largest of each group GROUP_R x GROUP_C of a tile [R, C] of magnitudes' bits: [R / GROUP_R, C / GROUP_C]."""
    R: tl.constexpr = bits.shape[0]
    C: tl.constexpr = bits.shape[1]
    grouped = tl.reshape(bits, [R // GROUP_R, GROUP_R, C // GROUP_C, GROUP_C])
    return tl.max(tl.max(grouped, axis=3), axis=1)


@triton.jit
def record_amax(x, amax, row0, rows, group_rows, PLAN: tl.constexpr):
    """Raise `amax` (int32 [group_rows + 1], bits) by a tile: each row's, where a row is a group, and at the end the tensor's."""
    R: tl.constexpr = x.shape[0]
    of_rows = tl.max(bits_of(x) & MAGNITUDE, axis=1)
    if PLAN.granularity == "row":
        row = row0 + tl.arange(0, R)
        tl.atomic_max(amax + row, of_rows, mask=row < rows)
    if PLAN.granularity == "tensor" or PLAN.scale == "two_level":
        tl.atomic_max(amax + group_rows, tl.max(of_rows, axis=0))


@triton.jit
def _variance(x, GROUP_R: tl.constexpr, GROUP_C: tl.constexpr):
    """fp32 variances of a tile's groups, [R / GROUP_R, C / GROUP_C], in fp64 until they are rounded once, as torch's on a CPU are."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    part: tl.constexpr = 1.0 / (GROUP_R * GROUP_C)
    grouped = tl.reshape(x.to(tl.float64), [R // GROUP_R, GROUP_R, C // GROUP_C, GROUP_C])
    mean = tl.sum(tl.sum(grouped, axis=3), axis=1) * part
    apart = grouped - mean[:, None, :, None]
    return (tl.sum(tl.sum(apart * apart, axis=3), axis=1) * part).to(tl.float32)


@triton.jit
def store_quantized(x, random, codes, scales, whole, amax, group_rows, group_columns, row0, column0, rows, columns, PLAN: tl.constexpr):
    """Quantise a tile [R, C] fp32 that begins at (row0, column0) of a tensor [rows, columns], and store its part of a `Packed`.

    Args:
        random: integers [R, C] whose low bits decide, for stochastic rounding.
        codes, scales, whole: where the parts go, contiguous.
        amax: int32 [group_rows + 1], from `record_amax` of the whole tensor; read where the plan needs it.
        group_rows, group_columns: the shape of the scales, 1 where there is no dim.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    GROUP_R: tl.constexpr = R if PLAN.granularity == "tensor" else (PLAN.block if PLAN.granularity == "tile" else 1)
    GROUP_C: tl.constexpr = PLAN.block if PLAN.granularity == "block" or PLAN.granularity == "tile" else C
    group_row = row0 // GROUP_R + tl.arange(0, R // GROUP_R)
    group_column = column0 // GROUP_C + tl.arange(0, C // GROUP_C)
    place = group_row.to(tl.int64)[:, None] * group_columns + group_column[None, :]
    inside = (group_row < group_rows)[:, None] & (group_column < group_columns)[None, :]

    if PLAN.granularity == "row" and PLAN.needs_amax:
        most = float_of(tl.load(amax + tl.minimum(group_row, group_rows - 1)))[:, None]
    elif PLAN.granularity == "tensor":
        most = float_of(tl.load(amax + group_rows + tl.zeros_like(group_row)))[:, None]
    else:
        most = float_of(largest(bits_of(x) & MAGNITUDE, GROUP_R, GROUP_C))

    if PLAN.scale == "full":
        scale = full_scale(most, PLAN.most)
        stored = scale
    elif PLAN.scale == "two_level":
        of_tensor = whole_scale(float_of(tl.load(amax + group_rows)), PLAN.most)
        if (row0 == 0) & (column0 == 0):
            tl.store(whole, of_tensor)
        stored = two_level_scale(most, of_tensor, PLAN.most, PLAN.e4m3, PLAN.e4m3_max_bits)
        scale = tl.where((most == 0) & (bits_of(of_tensor) < INFINITY), 1.0, decode(stored, PLAN.e4m3) * of_tensor)
        scale = tl.where(scale == 0, 1.0, scale)  # underflown: the values become zeros
    else:
        if PLAN.scale == "rms":
            power = rms_scale(_variance(x, GROUP_R, GROUP_C), PLAN.clip)
        else:
            power = power_scale(most, PLAN.most, PLAN.most_bits, PLAN.scale == "ceil")
        stored = power.to(tl.uint8)
        # Times the inverse power is the same real number rounded the same way as over the power, and cheaper; 2^127 has an inverse among denormal numbers.
        scale = tl.where(power == 255, float("nan"), decode_power(254 - power))
    tl.store(scales + place, stored, mask=inside)

    grouped = tl.reshape(x, [R // GROUP_R, GROUP_R, C // GROUP_C, GROUP_C])
    scale, grouped = tl.broadcast(scale[:, None, :, None], grouped)
    if PLAN.scale == "full" or PLAN.scale == "two_level":
        scaled = tl.math.div_rn(grouped, scale)
    else:
        scaled = grouped * scale
    scaled = tl.reshape(scaled, [R, C])
    if PLAN.shrink != 1.0:
        scaled = scaled * PLAN.shrink
    if PLAN.stochastic:
        code = stochastic_code(scaled, random, PLAN.format, PLAN.max_bits)
    else:
        code = nearest_code(scaled, PLAN.format, PLAN.max_bits)

    row = row0 + tl.arange(0, R)
    if PLAN.format.bits == 4:
        low, high = tl.split(tl.reshape(code, [R, C // 2, 2]))
        code = low | (high << 4)
        width = columns // 2
        column = column0 // 2 + tl.arange(0, C // 2)
    else:
        width = columns
        column = column0 + tl.arange(0, C)
    tl.store(codes + row.to(tl.int64)[:, None] * width + column[None, :], code, mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def draw(key, row_index, column, whole_columns, PLAN: tl.constexpr):
    """`rounding_bits` [R, C] for elements at (row_index [R] int64, column [C]) of a tensor of `whole_columns`; zeros where nothing is left to chance."""
    if PLAN.stochastic:
        pair = row_index[:, None] * ((whole_columns + 1) // 2) + (column >> 1).to(tl.int64)[None, :]
        return (random_bits(key, pair) >> ((column & 1) * 32).to(tl.uint64)[None, :]).to(tl.int32)
    else:
        return tl.zeros([row_index.shape[0], column.shape[0]], tl.int32)
