"""Products of quantised matrices on a GPU, from their codes: values go through the tensor cores unscaled, scales meet the fp32 sums of their block.

Every value of E2M1, E4M3 and E5M2 is a number of fp16 (at most 4 significant bits, magnitudes from 2^-16, which fp16 has among its denormal numbers, to 57344, and fp16 ends at
65504), and the product of two has at most 8 significant bits: operands lose nothing on their way into the tensor cores, and products nothing before they are summed in fp32.
Eight-bit tensor cores of some GPUs sum in fewer bits than fp32 has; these instructions do not.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (kernels are in a language that only looks like Python)

import torch
import triton
import triton.language as tl

from regrowth.kernels.packed import Packed
from regrowth.kernels.triton_dequantize import load_values, scale_of
from regrowth.kernels.triton_formats import narrowed
from regrowth.kernels.triton_tiles import plan_of, scale_matrix

_LEAST = 16  # values along the contracted dim of one tensor core's instruction


def scaled_matmul(a: Packed, b: Packed, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed: [M, N] in bf16 or fp32.

    Differs from the exact product of the dequantised operands by what fp32 sums of K numbers do, in an order of their own: at most
    (K + 8) 2^-23 (|a| |b|^T), where tensor cores may cut off instead of rounding; and, in bf16, by its rounding.

    Raises:
        ValueError: operands are no matrices, or contract different dims; blocks below 16; another dtype.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"operands of shapes {list(a.shape)} and {list(b.shape)} have no product; both are matrices with the contracted dim last"
        )
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"products are bf16 or fp32, not {dtype}")
    (m, k), n = a.shape, b.shape[0]
    sizes = [q.block for q in (a.quantizer, b.quantizer) if q.granularity in ("block", "tile")]
    if sizes and min(sizes) < _LEAST:
        raise ValueError(
            f"scales for each {min(sizes)} of the contracted dim: tensor cores sum at least {_LEAST} at once; choose a block that is no smaller"
        )
    out = torch.zeros(m, n, dtype=dtype, device=a.codes.device)
    if m and n and k:
        tile_m, tile_n, tile_k = (128 if m >= 128 else 32), (128 if n >= 128 else 32), min([64, *sizes])
        arguments = [argument for operand in (a, b) for argument in _arguments(operand)]
        plans = plan_of(a.quantizer), plan_of(b.quantizer)
        grid = (triton.cdiv(m, tile_m), triton.cdiv(n, tile_n))
        _gemm_kernel[grid](
            *arguments, out, m, n, k, *plans, not sizes, tile_m, tile_n, tile_k, num_warps=8 if tile_m + tile_n == 256 else 4
        )
    return out


def _arguments(operand: Packed) -> list[torch.Tensor | int]:
    """Its buffers, the row length of its scales, and how many rows and columns share one."""
    down, across = scale_matrix(operand.shape, operand.quantizer)
    whole = operand.scales if operand.whole is None else operand.whole
    rows, columns = operand.shape
    return [operand.codes.contiguous(), operand.scales.contiguous(), whole, across, rows // down, columns // across]


@triton.jit
def _gemm_kernel(
    a_codes, a_scales, a_whole, a_across, a_row_step, a_column_step, b_codes, b_scales, b_whole, b_across, b_row_step, b_column_step, out, m, n, k,
    A: tl.constexpr, B: tl.constexpr, ONE_BLOCK: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    a_place = a_scales + (row // a_row_step).to(tl.int64) * a_across
    b_place = b_scales + (column // b_row_step).to(tl.int64) * b_across
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for k0 in range(0, k, TILE_K):
        inner = k0 + tl.arange(0, TILE_K)
        a = load_values(a_codes, row, inner, row < m, k0, k, A, TILE_K).to(tl.float16)
        b = load_values(b_codes, column, inner, column < n, k0, k, B, TILE_K).to(tl.float16)
        if ONE_BLOCK:  # scales of whole rows wait for the end
            total = tl.dot(a, tl.trans(b), total)
        else:
            a_scale = scale_of(tl.load(a_place + k0 // a_column_step, mask=row < m, other=0), a_whole, A)
            b_scale = scale_of(tl.load(b_place + k0 // b_column_step, mask=column < n, other=0), b_whole, B)
            # One after the other: the product of two small scales may not be a number of fp32 where the result is.
            total += tl.dot(a, tl.trans(b)) * a_scale[:, None] * b_scale[None, :]
    if ONE_BLOCK:
        a_scale = scale_of(tl.load(a_place, mask=row < m, other=0), a_whole, A)
        b_scale = scale_of(tl.load(b_place, mask=column < n, other=0), b_whole, B)
        total = total * a_scale[:, None] * b_scale[None, :]
    if A.shrink * B.shrink != 1.0:
        total = total / (A.shrink * B.shrink)
    mask = (row < m)[:, None] & (column < n)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * n + column[None, :], narrowed(total, out.dtype.element_ty), mask=mask)
