"""From codes back to values on a GPU: whole tensors, and the pieces that a GEMM reads."""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (kernels are in a language that only looks like Python)

import torch
import triton
import triton.language as tl

from regrowth.kernels.packed import Packed
from regrowth.kernels.triton_formats import decode, decode_power, narrowed
from regrowth.kernels.triton_tiles import plan_of, scale_matrix


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`packed.dequantize()` of a matrix [M, K], rounded to `dtype`."""
    if len(packed.shape) != 2:
        raise ValueError(f"the Triton kernels take matrices, not a tensor of shape {list(packed.shape)}")
    (rows, columns), plan = packed.shape, plan_of(packed.quantizer)
    out = torch.empty(rows, columns, dtype=dtype, device=packed.codes.device)
    if out.numel():
        group_rows, group_columns = scale_matrix(packed.shape, packed.quantizer)
        whole = packed.scales if packed.whole is None else packed.whole
        row_step, column_step = rows // group_rows, columns // group_columns
        grid = (triton.cdiv(rows, 32), triton.cdiv(columns, 128))
        _dequantize_kernel[grid](packed.codes.contiguous(), packed.scales.contiguous(), whole, out, rows, columns, group_columns, row_step, column_step, plan, 32, 128, enable_fp_fusion=False)  # fmt: skip
    return out


@triton.jit
def scale_of(stored, whole, PLAN: tl.constexpr):
    """fp32 scales as `Packed.scale_values` has them; `whole` is a pointer."""
    if PLAN.scale == "full":
        return stored
    elif PLAN.scale == "two_level":
        return decode(stored, PLAN.e4m3) * tl.load(whole)
    else:
        return decode_power(stored)


@triton.jit
def load_values(codes, row, column, row_mask, column0, columns, PLAN: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 values [rows, WIDTH] of codes from column0 on, without their scales; 0 beyond the edges."""
    start = codes + row.to(tl.int64)[:, None] * (columns * PLAN.format.bits // 8)
    if PLAN.format.bits == 4:
        byte = column0 // 2 + tl.arange(0, WIDTH // 2)
        both = tl.load(start + byte[None, :], mask=row_mask[:, None] & (byte < columns // 2)[None, :], other=0)
        code = tl.reshape(tl.join(both & 0xF, both >> 4), [row.shape[0], WIDTH])
    else:
        code = tl.load(start + column[None, :], mask=row_mask[:, None] & (column < columns)[None, :], other=0)
    return decode(code, PLAN.format)


@triton.jit
def _dequantize_kernel(
    codes, scales, whole, out, rows, columns, group_columns, row_step, column_step, PLAN: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    column0 = tl.program_id(1) * TILE_K
    column = column0 + tl.arange(0, TILE_K)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    values = load_values(codes, row, column, row < rows, column0, columns, PLAN, TILE_K)
    place = (row // row_step).to(tl.int64)[:, None] * group_columns + (column // column_step)[None, :]
    values = values * scale_of(tl.load(scales + place, mask=mask, other=0), whole, PLAN)
    if PLAN.shrink != 1.0:
        values = tl.math.div_rn(values, tl.full(values.shape, PLAN.shrink, tl.float32))
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], narrowed(values, out.dtype.element_ty), mask=mask)
