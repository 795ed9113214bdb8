"""What comes before a linear and its quantisation in one kernel: the wide values in between never reach memory.

Each follows the plain operators, `silu(gate) * up` in the inputs' dtype and `pointwise.rms_norm`, with a rounding to that dtype wherever they have one. A GPU's exponential and the
order in which a row's squares are summed may differ from theirs in the last bit of fp32; then a value near a tie gets the neighbouring code, and a scale in fp32 another last bit.
Where the exponential vanishes beside 1 and where sums of squares are exact, every stored bit is the same.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (kernels are in a language that only looks like Python)

import torch
import triton
import triton.language as tl

from regrowth.kernels.packed import Packed
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.triton_formats import narrowed, widened
from regrowth.kernels.triton_quantize import WIDEST, Operand, Target, launch_tile, row_tile, target_of
from regrowth.kernels.triton_tiles import draw, store_quantized, transform


def swiglu_quantize(gate: torch.Tensor, up: torch.Tensor, operand: Operand | Quantizer) -> Packed:
    """silu(gate) * up (Shazeer 2020), quantised by rows; both [M, K] in the same of fp32, bf16, fp16.

    Raises:
        ValueError: as `quantize_rows`; the two are unlike; scales that need more than a block or tile.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {list(gate.shape)} and up {up.dtype} {list(up.shape)} are not alike")
    target = _target(gate, operand)
    m, k = gate.shape
    if gate.numel():
        tile_m, tile_k = launch_tile(target.plan, None)
        grid = (triton.cdiv(m, tile_m), triton.cdiv(k, tile_k))
        _swiglu_kernel[grid](
            gate.contiguous(), up.contiguous(), m, k, *target.arguments(), target.plan, tile_m, tile_k, enable_fp_fusion=False
        )
    return target.packed


def rms_norm_quantize(x: torch.Tensor, weight: torch.Tensor, eps: float, operand: Operand | Quantizer) -> Packed:
    """x / rms(x) * weight of rows x [M, K] (Zhang and Sennrich 2019), quantised by rows; weight [K].

    Raises:
        ValueError: as `swiglu_quantize`; weight is no row of x; K above 32768, which no program holds.
    """
    target = _target(x, operand, rows_in_tile=True)
    m, k = x.shape
    if weight.shape != (k,) or k > WIDEST:
        raise ValueError(f"rows of {k} with a weight of shape {list(weight.shape)}: one weight a column, and at most {WIDEST} columns")
    if x.numel():
        tile_m, width = row_tile(target.plan, k)
        _rms_norm_kernel[(triton.cdiv(m, tile_m),)](x.contiguous(), weight.float().contiguous(), m, k, eps, *target.arguments(), target.plan, tile_m, width, num_warps=8, enable_fp_fusion=False)  # fmt: skip
    return target.packed


def _target(x: torch.Tensor, operand: Operand | Quantizer, rows_in_tile: bool = False) -> Target:
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the Triton kernels take matrices of fp32, bf16 or fp16, not {x.dtype} {list(x.shape)}")
    target = target_of(operand, (x.shape[0], x.shape[1]), x.device, rows_in_tile)
    if target.plan.needs_amax:
        raise ValueError('fused kernels see a tile alone: they need granularity = "block" or "tile" and a scale other than "two_level"')
    return target


@triton.jit(do_not_specialize=["key"])
def _swiglu_kernel(
    gate, up, m, k, codes, scales, whole, amax, signs, key, groups, group_columns, PLAN: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    place = row.to(tl.int64)[:, None] * k + column[None, :]
    mask = (row < m)[:, None] & (column < k)[None, :]
    g = widened(tl.load(gate + place, mask=mask, other=0.0))
    silu = tl.math.div_rn(g, 1.0 + tl.exp(-g))
    hidden = widened(narrowed(silu, gate.dtype.element_ty)) * widened(tl.load(up + place, mask=mask, other=0.0))
    hidden = transform(widened(narrowed(hidden, gate.dtype.element_ty)), signs, PLAN)
    random = draw(key, row.to(tl.int64), column, k, PLAN)
    store_quantized(
        hidden, random, codes, scales, whole, amax, groups, group_columns, tl.program_id(0) * TILE_M, tl.program_id(1) * TILE_K, m, k, PLAN
    )


@triton.jit(do_not_specialize=["key"])
def _rms_norm_kernel(
    x, weight, m, k, eps, codes, scales, whole, amax, signs, key, groups, group_columns, PLAN: tl.constexpr, TILE_M: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    column = tl.arange(0, WIDTH)
    place = row.to(tl.int64)[:, None] * k + column[None, :]
    wide = widened(tl.load(x + place, mask=(row < m)[:, None] & (column < k)[None, :], other=0.0))
    of_columns = tl.load(weight + column, mask=column < k, other=0.0)
    mean = tl.math.div_rn(tl.sum(wide * wide, axis=1), tl.full([TILE_M], k, tl.float32))
    deviation = tl.math.sqrt_rn(mean + eps)
    inverse = tl.math.div_rn(tl.full([TILE_M], 1.0, tl.float32), deviation)
    normed = narrowed(wide * inverse[:, None] * of_columns[None, :], x.dtype.element_ty)
    turned = transform(widened(normed), signs, PLAN)
    random = draw(key, row.to(tl.int64), column, k, PLAN)
    store_quantized(turned, random, codes, scales, whole, amax, groups, group_columns, tl.program_id(0) * TILE_M, 0, m, k, PLAN)
