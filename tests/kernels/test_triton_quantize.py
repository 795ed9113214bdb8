"""Triton's quantisers give the reference's bits: every format, group, scale and way of rounding, at every edge. Interpreted where there is no GPU."""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (kernels are in a language that only looks like Python)

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrowth.kernels.formats import E4M3, E5M2, FORMATS, Format, encode, encode_power, round_stochastic, round_to
from regrowth.kernels.formats import decode as plain_decode
from regrowth.kernels.formats import decode_power as plain_power
from regrowth.kernels.hadamard import hadamard, random_signs
from regrowth.kernels.packed import Packed, pack_tensor
from regrowth.kernels.quantize import Granularity, Quantizer, Rounding, Scale
from regrowth.kernels.random import _signed, random_bits, rounding_bits
from tests.kernels.test_packed import rules, same

pytest.importorskip("triton")

import triton
import triton.language as tl

from regrowth.kernels import triton_formats, triton_quantize
from regrowth.kernels.triton_dequantize import dequantize
from regrowth.kernels.triton_quantize import Operand, Place, quantize_both, quantize_columns, quantize_rows
from regrowth.kernels.triton_tiles import plan_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = 0xFEDCBA9876543210  # its top bit is set


def assert_same(got: Packed, wanted: Packed) -> None:
    """Every stored bit, NaN's included."""
    assert (got.shape, got.quantizer) == (wanted.shape, wanted.quantizer)
    for mine, plain in ((got.codes, wanted.codes), (got.scales, wanted.scales), (got.whole, wanted.whole)):
        if plain is None or mine is None:
            assert mine is plain
        else:
            assert mine.dtype == plain.dtype and mine.shape == plain.shape
            exact = torch.int32 if plain.dtype == torch.float32 else torch.uint8
            assert torch.equal(mine.cpu().view(exact), plain.cpu().view(exact))


def moved(packed: Packed, device: str) -> Packed:
    """The same on another device."""
    whole = None if packed.whole is None else packed.whole.to(device)
    return Packed(packed.codes.to(device), packed.scales.to(device), whole, packed.shape, packed.quantizer)


def reference(x: torch.Tensor, operand: Operand, random: torch.Tensor | None = None, down: bool = False) -> Packed:
    """By `pack_tensor`, of x or of its transpose."""
    if down:
        x, random = x.t().contiguous(), None if random is None else random.t().contiguous()
    turned = hadamard(x, operand.hadamard, operand.signs) if operand.hadamard else x
    return pack_tensor(turned, operand.quantizer, random=random)


def sample(m: int, k: int) -> torch.Tensor:
    """[m, k] with magnitudes far apart, zeros of both signs, a group of zeros, and denormal numbers."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * 1000 + k)) * torch.logspace(-5, 5, m)[:, None]
    x[:, -1], x[m // 2], x[: m // 3, : k // 3], x[m // 4] = 0.0, -0.0, 0.0, x[m // 4] * 1e-38
    return x


@triton.jit
def round_kernel(x, random, codes, values, key, n, FORMAT: tl.constexpr, MAX_BITS: tl.constexpr, CHANCE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    number = tl.load(x + i, mask=i < n, other=0.0)
    if CHANCE:
        bits = triton_formats.random_bits(key, i.to(tl.int64) * 0x123456789)
        tl.store(random + i, bits.to(tl.int64, bitcast=True), mask=i < n)
        code = triton_formats.stochastic_code(number, bits, FORMAT, MAX_BITS)
    else:
        code = triton_formats.nearest_code(number, FORMAT, MAX_BITS)
    tl.store(codes + i, code, mask=i < n)
    tl.store(values + i, triton_formats.decode(code, FORMAT), mask=i < n)


@pytest.mark.parametrize("chance", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_every_fp16_number_every_tie_and_any_bits_round_as_in_the_reference(format: Format, chance: bool) -> None:
    grid = plain_decode(torch.arange(1 << (format.bits - 1), dtype=torch.uint8), format)
    grid = grid[grid.isfinite()]
    ties = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([torch.nextafter(ties, torch.tensor(to)) for to in (0.0, math.inf)])
    halves = torch.arange(1 << 16).to(torch.int16).view(torch.float16).float()
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    x = torch.cat(
        [grid, ties, -ties, near, -near, halves, any_bits, torch.tensor([math.inf, -math.inf, math.nan, 3e38, 1e-45, -1e-45, -0.0])]
    )
    index, n, size = torch.arange(len(x)) * 0x123456789, len(x), 1 << 13
    random, codes, values = (torch.zeros(n, dtype=d, device=DEVICE) for d in (torch.int64, torch.uint8, torch.float32))
    max_bits = plan_of(Quantizer(format.name)).max_bits  # type: ignore[arg-type]
    round_kernel[(triton.cdiv(n, size),)](x.to(DEVICE), random, codes, values, _signed(KEY), n, format, max_bits, chance, size)
    wanted = round_stochastic(x, format, random_bits(KEY, index)) if chance else round_to(x, format)
    none = wanted.isnan()
    assert not chance or torch.equal(random.cpu(), random_bits(KEY, index))
    assert torch.equal(codes.cpu(), encode(wanted.masked_fill(none, math.nan if format.bits == 8 else 0.0), format))
    assert same(values.cpu()[~none], wanted[~none]) and (format.bits == 4 or values.cpu()[none].isnan().all())


@triton.jit
def code_kernel(codes, x, values, down, up, n, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    code = tl.load(codes + i)
    tl.store(values + i, triton_formats.decode_power(code) if FORMAT is None else triton_formats.decode(code, FORMAT))
    j = tl.arange(0, SIZE * 16)
    scale = tl.load(x + j, mask=j < n, other=0.0)
    tl.store(down + j, triton_formats.power_at_or_below(scale), mask=j < n)
    tl.store(up + j, triton_formats.power_at_or_above(scale), mask=j < n)


@pytest.mark.parametrize("format", [None, E4M3, E5M2], ids=["e8m0", "e4m3", "e5m2"])
def test_every_code_decodes_and_every_power_of_two_is_found(format: Format | None) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    powers = plain_power(codes[:255])
    x = torch.cat([powers * part for part in (0.5, 1.0, 1.5)] + [torch.nextafter(powers, torch.tensor(to)) for to in (0.0, math.inf)])
    x = torch.cat([x, torch.tensor([0.0, math.inf, math.nan, 1e-45, 2.0**-128])])
    values, (down, up) = torch.zeros(256, device=DEVICE), (torch.zeros(len(x), dtype=torch.int32, device=DEVICE) for _ in range(2))
    code_kernel[(1,)](codes.to(DEVICE), x.to(DEVICE), values, down, up, len(x), format, 256)
    assert same(values.cpu(), plain_decode(codes, format) if format else plain_power(codes))
    assert torch.equal(down.cpu(), encode_power(x).int()) and torch.equal(up.cpu(), encode_power(x, up=True).int())


@pytest.mark.parametrize(("granularity", "scale"), rules())
@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_columns_of_one_reading_are_the_references(format: str, granularity: Granularity, scale: Scale) -> None:
    if scale == "rms" and format != "e2m1":
        return
    bits = rounding_bits(KEY, torch.arange(48), 80)
    good, spoilt = sample(48, 80), sample(48, 80).bfloat16()
    spoilt[3, 40], spoilt[20, 70], spoilt[40, 2] = math.nan, math.inf, -math.inf
    cases: list[tuple[torch.Tensor, Rounding, float]] = [(good, "nearest", 1.0), (spoilt, "stochastic", 0.75)]
    for x, rounding, shrink in cases:
        operand = Operand(Quantizer(format, granularity, 16, scale, rounding, shrink), key=KEY)  # type: ignore[arg-type]
        rows, columns = quantize_both(x.to(DEVICE), operand, operand)
        assert_same(rows, reference(x, operand, bits))
        assert_same(columns, reference(x, operand, bits, down=True))
        assert same(dequantize(rows).cpu(), moved(rows, "cpu").dequantize())


@pytest.mark.parametrize("scale", ["full", "two_level", "floor"])
@pytest.mark.parametrize(("size", "signed"), [(16, True), (32, False), (128, True)])
def test_hadamard_transforms_run_along_the_groups_before_anything_is_measured(size: int, signed: bool, scale: Scale) -> None:
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).half()[:, :: 128 // max(size, 64)].contiguous()
    x = x if size == 128 else x[:64]
    signs = random_signs(size, 7) if signed else None
    for granularity in ("row", "block"):
        operand = Operand(Quantizer("e2m1", granularity, 16, scale), size, signs)
        rows, columns = quantize_both(x.to(DEVICE), operand, operand)
        assert_same(rows, reference(x, operand))
        assert_same(columns, reference(x, operand, down=True))


def test_operands_of_one_reading_may_differ() -> None:
    x = sample(64, 48)
    first = Operand(Quantizer("e4m3", "row", rounding="stochastic"), 16, random_signs(16, 1), key=3)
    second = Operand(Quantizer("e2m1", "block", 32, "two_level", "stochastic"), key=4)
    rows, columns = quantize_both(x.to(DEVICE), first, second)
    assert_same(rows, reference(x, first, rounding_bits(3, torch.arange(64), 48)))
    assert_same(columns, reference(x, second, rounding_bits(4, torch.arange(64), 48), down=True))
    assert_same(quantize_rows(x.to(DEVICE), first), rows)
    assert_same(quantize_columns(x.to(DEVICE), second), columns)


@pytest.mark.parametrize("scale", ["full", "floor", "two_level"])
@pytest.mark.parametrize(
    ("granularity", "block", "m", "k"),
    [("row", 128, 5, 70), ("row", 128, 1, 2), ("block", 16, 33, 80), ("block", 32, 3, 32), ("block", 128, 2, 384), ("tile", 128, 128, 256), ("tile", 16, 48, 16)],
)  # fmt: skip
def test_edges_that_no_launch_tile_divides(granularity: Granularity, block: int, m: int, k: int, scale: Scale) -> None:
    x, operand = sample(m, k), Operand(Quantizer("e2m1", granularity, block, scale))
    assert_same(quantize_rows(x.to(DEVICE), operand), reference(x, operand))
    assert_same(quantize_columns(x.t().to(DEVICE), operand), reference(x, operand))  # strides of a transpose, the same groups


def test_no_bit_depends_on_the_tile_that_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(64, 128).to(DEVICE)
    operand = Operand(Quantizer("e2m1", "block", 16, "two_level", "stochastic"), 16, key=5)
    wanted = quantize_both(x, operand, operand)
    for tile in ((16, 128), (128, 16)):
        monkeypatch.setattr(triton_quantize, "launch_tile", lambda *plans, tile=tile: tile)
        for got, expected in zip(quantize_both(x, operand, operand), wanted, strict=True):
            assert_same(got, expected)


def test_a_slice_is_rounded_by_chance_as_the_whole_is() -> None:
    whole, operand = sample(64, 96), Operand(Quantizer("e4m3", "block", 16, "floor", "stochastic"), key=KEY)
    expected, down = quantize_both(whole, operand, operand)
    mine = torch.arange(16).repeat_interleave(2) * 4 + torch.arange(2).repeat(16)  # rows as a zigzag of ranks may hold them
    place = Place(mine, columns=96, column_offset=32)
    got = quantize_rows(whole[mine, 32:80].to(DEVICE), operand, place)
    assert torch.equal(got.codes.cpu(), expected.codes.cpu()[mine, 32:80]) and torch.equal(
        got.scales.cpu(), expected.scales.cpu()[mine, 2:5]
    )
    below = quantize_columns(whole[16:48, 32:80].to(DEVICE), operand, Place(torch.arange(16, 48), 96, 32))
    assert torch.equal(below.codes.cpu(), down.codes.cpu()[32:80, 16:48])


def test_values_come_back_in_any_type() -> None:
    for quantizer in (
        Quantizer("e2m1", "block", 16, "two_level", shrink=0.75),
        Quantizer("e5m2", "tile", 16, "floor"),
        Quantizer("e4m3", "tensor"),
    ):
        packed = pack_tensor(sample(48, 80), quantizer)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(dequantize(moved(packed, DEVICE), dtype).cpu(), packed.dequantize().to(dtype))


def test_empty_matrices_are_quantised() -> None:
    for (m, k), (granularity, scale) in itertools.product([(0, 32), (16, 0), (0, 0)], rules()):
        if scale != "rms":
            operand = Operand(Quantizer("e2m1", granularity, 16, scale))
            assert_same(quantize_rows(torch.zeros(m, k, device=DEVICE), operand), reference(torch.zeros(m, k), operand))


def test_what_the_kernels_do_not_take_is_refused() -> None:
    x = torch.ones(6, 24)
    wrong: list[tuple[str, torch.Tensor, Operand]] = [
        ("blocks of 16 do not divide the contracted dim of 24", x, Operand(Quantizer("e4m3", "block", 16))),
        ("powers of two, not 24", x, Operand(Quantizer("e4m3", "block", 24))),
        ("Hadamard transform of 16 does not fit a dim of 24", x, Operand(Quantizer("e4m3"), 16)),
        ("Hadamard transform of 8 does not fit", x, Operand(Quantizer("e4m3"), 8)),
        ("needs the key", x, Operand(Quantizer("e4m3", rounding="stochastic"))),
        ("the last dim of 23 is odd", x[:, :23], Operand(Quantizer("e2m1"))),
        ("set outliers = None", x, Operand(Quantizer("e4m3", outliers=0.99))),
        ("without a format", x, Operand(Quantizer())),
        ("not torch.float64", x.double(), Operand(Quantizer("e4m3"))),
        (r"matrices of .*\[2, 3, 24\]", x.view(2, 3, 24), Operand(Quantizer("e4m3"))),
    ]
    for message, tensor, operand in wrong:
        with pytest.raises(ValueError, match=message):
            quantize_rows(tensor, operand)
    with pytest.raises(ValueError, match="blocks of 16 do not divide the contracted dim of 6"):
        quantize_columns(x, Quantizer("e4m3", "block", 16))


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.triton_quantize import _quantize_kernel as kernel
from regrowth.kernels.triton_tiles import plan_of

plans = {"ROWS": plan_of(Quantizer("e2m1", "block", 16, "two_level", "stochastic", 0.75), 16, True), "COLUMNS": plan_of(Quantizer("e2m1", "block", 32, "rms"))}
types = {"x": "*bf16", "row_index": "*i64", "row_key": "i64", "column_key": "i64"}
ends = {"_codes": "*u8", "_scales": "*u8", "_whole": "*fp32", "_amax": "*i32", "_signs": "*fp32"}
constants = {**plans, "TILE_M": 32, "TILE_K": 32}
signature = {n: "constexpr" if n in constants else types.get(n) or next((t for end, t in ends.items() if n.endswith(end)), "i32") for n in kernel.arg_names}
done = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
print(done.asm["ptx"])
"""


@pytest.mark.skipif(
    not hasattr(triton.backends, "backends") or "nvidia" not in triton.backends.backends, reason="no compiler for NVIDIA's GPUs"
)
def test_what_is_compiled_for_a_gpu_divides_exactly_and_fuses_and_flushes_nothing(tmp_path: Path) -> None:
    """Without a GPU the kernels can still be compiled for one, and read."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _as_file(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "div.rn.f32" in done.stdout and "sqrt.rn.f32" in done.stdout
    for inexact in (".ftz", "fma.rn.f32", "div.full", "approx"):
        assert inexact not in done.stdout, inexact


def _as_file(folder: Path) -> str:
    (folder / "compile.py").write_text(COMPILE)
    return f"import runpy; runpy.run_path({str(folder / 'compile.py')!r})"
