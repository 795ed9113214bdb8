"""Quantisation on a GPU, bit for bit as `packed.pack_tensor` does it: by rows, by columns (stored transposed, ready as a GEMM operand), or both in one pass.

A tensor is read once where groups fit into a tile (whole rows do, where columns are not asked for too), and once more before that where a scale needs what no tile holds:
rows beside columns, one scale for the tensor, two levels.
The tile's shape changes no bit: autotuning picks it for each size of tensor, on GPUs alone.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (kernels are in a language that only looks like Python)

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from regrowth.kernels.hadamard import SIZES
from regrowth.kernels.packed import Packed, check_storable, expected_shapes
from regrowth.kernels.quantize import AmaxGroups, Quantizer, _reduce
from regrowth.kernels.random import _signed
from regrowth.kernels.triton_formats import widened
from regrowth.kernels.triton_tiles import Plan, draw, plan_of, record_amax, scale_matrix, store_quantized, transform

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCALE_DTYPES = {"full": torch.float32}  # the others' are codes


@dataclass(frozen=True)
class Operand:
    """What is made of a tensor along one of its dims.

    Attributes:
        hadamard, signs: `hadamard.hadamard` along that dim before it is quantised.
        key: of the stream (`random_key`) that stochastic rounding draws from.
        groups: ranks that hold the other slices, as in `Quantizer.quantize`.
    """

    quantizer: Quantizer
    hadamard: int | None = None
    signs: torch.Tensor | None = None
    key: int | None = None
    groups: AmaxGroups | None = None


@dataclass(frozen=True)
class Place:
    """Where a slice [M, K] lies in the whole tensor, so that it is rounded by chance as it would be there: the draw of an element is that of its global index.

    Attributes:
        row_index: int64 [M], each row's in the whole tensor; None for 0, 1, ...
        columns: of the whole tensor; None for K.
        column_offset: the slice's first column.
    """

    row_index: torch.Tensor | None = None
    columns: int | None = None
    column_offset: int = 0


def quantize_rows(x: torch.Tensor, operand: Operand | Quantizer, place: Place | None = None) -> Packed:
    """x [M, K] (fp32, bf16, fp16, any strides) with groups along K, as `pack_tensor(hadamard(x))` gives it.

    Raises:
        ValueError: as `pack_tensor` and `hadamard`; x is no matrix of these types; blocks that are no power of two; stochastic rounding without a key.
    """
    rows, _ = _quantize(x, operand, None, place or Place())
    assert rows is not None
    return rows


def quantize_columns(x: torch.Tensor, operand: Operand | Quantizer, place: Place | None = None) -> Packed:
    """x [M, K] with groups along M, as a `Packed` of shape [K, M]: that of x's transpose by rows. The draws stay those of x's own elements.

    Raises:
        ValueError: as `quantize_rows`.
    """
    _, columns = _quantize(x, None, operand, place or Place())
    assert columns is not None
    return columns


def quantize_both(
    x: torch.Tensor, rows: Operand | Quantizer, columns: Operand | Quantizer, place: Place | None = None
) -> tuple[Packed, Packed]:
    """`quantize_rows` and `quantize_columns` for one reading of x.

    Raises:
        ValueError: as `quantize_rows`.
    """
    by_rows, by_columns = _quantize(x, rows, columns, place or Place())
    assert by_rows is not None and by_columns is not None
    return by_rows, by_columns


@dataclass
class Target:
    """One operand on its way: its plan, its buffers, and what else its part of a kernel reads."""

    operand: Operand
    plan: Plan
    packed: Packed
    amax: torch.Tensor  # int32 [group rows + 1]
    group_rows: int
    group_columns: int

    @property
    def signs(self) -> torch.Tensor:
        return self.amax if self.operand.signs is None else self.operand.signs

    def arguments(self) -> list[Any]:
        """What `store_quantized`, `transform` and `draw` take."""
        packed, whole = self.packed, self.packed.scales if self.packed.whole is None else self.packed.whole
        return [
            packed.codes,
            packed.scales,
            whole,
            self.amax,
            self.signs,
            _signed(self.operand.key or 0),
            self.group_rows,
            self.group_columns,
        ]


def _quantize(
    x: torch.Tensor, rows: Operand | Quantizer | None, columns: Operand | Quantizer | None, place: Place
) -> tuple[Packed | None, Packed | None]:
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise ValueError(f"the Triton kernels quantise matrices of fp32, bf16 or fp16, not {x.dtype} {list(x.shape)}")
    m, k = x.shape
    by_rows = None if rows is None else target_of(rows, (m, k), x.device, rows_in_tile=columns is None and k <= WIDEST)
    by_columns = None if columns is None else target_of(columns, (k, m), x.device)
    if x.numel():
        _launch(x, by_rows, by_columns, place)
    return by_rows and by_rows.packed, by_columns and by_columns.packed


def target_of(operand: Operand | Quantizer, shape: tuple[int, int], device: torch.device, rows_in_tile: bool = False) -> Target:
    """Buffers for an operand of `shape`, grouped along the last dim; those of an empty one hold what it has. `rows_in_tile`: launch tiles will be as wide as it.

    Raises:
        ValueError: as `quantize_rows`.
    """
    if isinstance(operand, Quantizer):
        operand = Operand(operand)
    quantizer, size = operand.quantizer, operand.hadamard
    check_storable(quantizer)
    if quantizer.rounding == "stochastic" and operand.key is None:
        raise ValueError('rounding = "stochastic" needs the key of its random bits')
    if size is not None and (size not in SIZES or shape[1] % size):
        raise ValueError(f"a Hadamard transform of {size} does not fit a dim of {shape[1]}; sizes are {', '.join(map(str, SIZES))}")
    if operand.signs is not None:
        operand = replace(operand, signs=operand.signs.to(device, torch.float32).contiguous())
    shapes, plan = expected_shapes(shape, quantizer), plan_of(quantizer, size, operand.signs is not None)
    if rows_in_tile and quantizer.granularity == "row" and operand.groups is None:
        plan = replace(plan, rows_in_tile=True)
    codes = torch.empty(shapes["codes"], dtype=torch.uint8, device=device)
    scales = torch.empty(shapes["scales"], dtype=_SCALE_DTYPES.get(quantizer.scale, torch.uint8), device=device)
    whole = torch.empty((), device=device) if quantizer.scale == "two_level" else None
    group_rows, group_columns = scale_matrix(shape, quantizer)
    amax = (
        torch.zeros(group_rows + 1, dtype=torch.int32, device=device)
        if plan.needs_amax
        else torch.empty(1, dtype=torch.int32, device=device)
    )
    if not math.prod(shape):
        scales.fill_({"full": 1.0, "two_level": 0x38}.get(quantizer.scale, 127))
        whole = whole if whole is None else whole.fill_(1.0)
    return Target(operand, plan, Packed(codes, scales, whole, shape, quantizer), amax, group_rows, group_columns)


def _launch(x: torch.Tensor, rows: Target | None, columns: Target | None, place: Place) -> None:
    (m, k), (either, *_) = x.shape, [t for t in (rows, columns) if t is not None]
    # What a kernel without one of the two is handed in its place is never read.
    by_rows, by_columns = rows or either, columns or either
    plans = rows and rows.plan, columns and columns.plan
    if any(plan is not None and plan.needs_amax for plan in plans):
        tile_m, tile_k = launch_tile(*plans)
        arguments = [a for t in (by_rows, by_columns) for a in (t.amax, t.signs, t.group_rows)]
        _amax_kernel[(triton.cdiv(m, tile_m), triton.cdiv(k, tile_k))](
            x, *x.stride(), m, k, *arguments, *plans, tile_m, tile_k, enable_fp_fusion=False
        )
        for target in (rows, columns):
            if target is not None and target.operand.groups is not None:
                _reduce(target.amax[:-1], target.operand.groups.row if target.plan.granularity == "row" else None)
                _reduce(target.amax[-1:], target.operand.groups.tensor)
    row_index = None if place.row_index is None else place.row_index.to(x.device, torch.int64).contiguous()
    whole_columns = k if place.columns is None else place.columns
    arguments = [x, *x.stride(), m, k, row_index, whole_columns, place.column_offset, *by_rows.arguments(), *by_columns.arguments()]
    wide = rows is not None and rows.plan.rows_in_tile and rows.plan
    if wide or not isinstance(_quantize_kernel, triton.JITFunction):  # one tile alone fits, or interpreted: nothing to tune
        tile_m, tile_k = row_tile(wide, k) if wide else launch_tile(*plans)
        grid = (triton.cdiv(m, tile_m), triton.cdiv(k, tile_k))
        _quantize_kernel[grid](*arguments, 0, 0, *plans, tile_m, tile_k, num_warps=8, enable_fp_fusion=False)
        return
    grid = lambda meta: (triton.cdiv(m, meta["TILE_M"]), triton.cdiv(k, meta["TILE_K"]))  # noqa: E731
    _tuned()[grid](*arguments, m.bit_length(), k.bit_length(), *plans, enable_fp_fusion=False)


def _least(rows: Plan | None, columns: Plan | None) -> tuple[int, int]:
    """A launch tile [m, k] that holds whole groups of both operands is a multiple of it."""
    least_m = max(rows.least_rows if rows else 1, columns.least_columns if columns else 1)
    return least_m, max(rows.least_columns if rows else 1, columns.least_rows if columns else 1)


def launch_tile(rows: Plan | None, columns: Plan | None) -> tuple[int, int]:
    """A launch tile that fits every plan, untuned."""
    least_m, least_k = _least(rows, columns)
    return max(least_m, 32), max(least_k, 64)


def row_tile(plan: Plan, k: int) -> tuple[int, int]:
    """A launch tile as wide as the tensor."""
    width = max(triton.next_power_of_2(k), launch_tile(plan, None)[1])
    return max(plan.least_rows, 4096 // width, 1), width


WIDEST = 1 << 15  # columns that one program can hold
_TILES = ((16, 128, 4), (32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8))  # m, k, warps


@functools.cache
def _tuned() -> Any:
    """The kernel that picks its tile by trying, once for each power of two of M and of K."""

    def fitting(configs: list[Any], named: dict[str, Any], **others: Any) -> list[Any]:
        plans = {**named, **others}
        least_m, least_k = _least(plans["ROWS"], plans["COLUMNS"])
        fit = [c for c in configs if c.kwargs["TILE_M"] % least_m == 0 and c.kwargs["TILE_K"] % least_k == 0]
        return fit or [triton.Config({"TILE_M": max(least_m, 32), "TILE_K": max(least_k, 64)}, num_warps=8)]

    configs = [triton.Config({"TILE_M": m, "TILE_K": k}, num_warps=warps) for m, k, warps in _TILES]
    tuner = triton.autotune(configs, key=["m_bits", "k_bits", "ROWS", "COLUMNS"], prune_configs_by={"early_config_prune": fitting})
    return tuner(_quantize_kernel)


@triton.jit
def _load(x, stride_m, stride_k, m, k, TILE_M: tl.constexpr, TILE_K: tl.constexpr):
    """A program's tile in fp32, zeros beyond the edges: they raise no amax, and no group of a block or tile straddles an edge."""
    row = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    mask = (row < m)[:, None] & (column < k)[None, :]
    place = row.to(tl.int64)[:, None] * stride_m + column.to(tl.int64)[None, :] * stride_k
    return widened(tl.load(x + place, mask=mask, other=0.0))


@triton.jit
def _amax_kernel(
    x, stride_m, stride_k, m, k, row_amax, row_signs, row_groups, column_amax, column_signs, column_groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tile = _load(x, stride_m, stride_k, m, k, TILE_M, TILE_K)
    if ROWS is not None and ROWS.needs_amax:
        record_amax(transform(tile, row_signs, ROWS), row_amax, tl.program_id(0) * TILE_M, m, row_groups, ROWS)
    if COLUMNS is not None and COLUMNS.needs_amax:
        record_amax(transform(tl.trans(tile), column_signs, COLUMNS), column_amax, tl.program_id(1) * TILE_K, k, column_groups, COLUMNS)


@triton.jit(do_not_specialize=["row_key", "column_key", "m_bits", "k_bits"])
def _quantize_kernel(
    x, stride_m, stride_k, m, k, row_index, whole_columns, column_offset,
    row_codes, row_scales, row_whole, row_amax, row_signs, row_key, row_groups, row_group_columns,
    column_codes, column_scales, column_whole, column_amax, column_signs, column_key, column_groups, column_group_columns,
    m_bits, k_bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    row0 = tl.program_id(0) * TILE_M
    column0 = tl.program_id(1) * TILE_K
    tile = _load(x, stride_m, stride_k, m, k, TILE_M, TILE_K)
    row = row0 + tl.arange(0, TILE_M)
    if row_index is None:
        index = row.to(tl.int64)
    else:
        index = tl.load(row_index + row, mask=row < m, other=0)
    column = column_offset + column0 + tl.arange(0, TILE_K)
    if ROWS is not None:
        random = draw(row_key, index, column, whole_columns, ROWS)
        turned = transform(tile, row_signs, ROWS)
        store_quantized(
            turned, random, row_codes, row_scales, row_whole, row_amax, row_groups, row_group_columns, row0, column0, m, k, ROWS
        )
    if COLUMNS is not None:
        random = tl.trans(draw(column_key, index, column, whole_columns, COLUMNS))
        turned = transform(tl.trans(tile), column_signs, COLUMNS)
        store_quantized(turned, random, column_codes, column_scales, column_whole, column_amax, column_groups, column_group_columns, column0, row0, k, m, COLUMNS)  # fmt: skip
