"""Products from codes are those of the dequantised operands, within what fp32 sums can differ by. Interpreted where there is no GPU."""

import itertools
import math

import pytest
import torch

from regrowth.kernels.formats import E2M1, E4M3, E5M2, FORMATS, decode
from regrowth.kernels.packed import Packed, pack_tensor
from regrowth.kernels.quantize import Quantizer

pytest.importorskip("triton")

from regrowth.kernels.triton_gemm import scaled_matmul
from regrowth.kernels.triton_quantize import quantize_columns
from tests.kernels.test_triton_quantize import DEVICE, moved

OPERANDS = {
    "fp8 by rows": (Quantizer("e4m3"), Quantizer("e4m3")),
    "fp8 by tensor": (Quantizer("e5m2", "tensor"), Quantizer("e4m3", "tensor")),
    "rows by blocks, weights by tiles": (Quantizer("e4m3", "block", 128), Quantizer("e4m3", "tile", 128)),
    "MXFP8": (Quantizer("e5m2", "block", 32, "floor"), Quantizer("e4m3", "block", 32, "ceil")),
    "MXFP4": (Quantizer("e2m1", "block", 32, "floor", shrink=0.75), Quantizer("e2m1", "block", 32, "rms")),
    "NVFP4": (Quantizer("e2m1", "block", 16, "two_level"), Quantizer("e2m1", "tile", 16, "two_level")),
    "four bits times eight, blocks unlike": (Quantizer("e2m1", "block", 16, "two_level"), Quantizer("e4m3", "block", 64)),
}


def operands(name: str, m: int, n: int, k: int) -> tuple[Packed, Packed]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator) * torch.logspace(-3, 3, rows)[:, None] for rows in (m, n))
    return pack_tensor(a, OPERANDS[name][0]), pack_tensor(b, OPERANDS[name][1])


def test_every_value_of_every_format_is_a_number_of_fp16() -> None:
    """And the product of any two is one of fp32: what the kernel's exactness rests on."""
    every = [decode(torch.arange(1 << format.bits, dtype=torch.uint8), format) for format in FORMATS.values()]
    every = [values[values.isfinite()] for values in every]
    for first, second in itertools.product(every, every):
        assert torch.equal(first.half().float(), first)
        assert torch.equal((first[:, None] * second).double(), first.double()[:, None] * second.double())
    assert {E2M1, E4M3, E5M2} == set(FORMATS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPERANDS)
def test_the_product_is_that_of_the_dequantised_operands(name: str, dtype: torch.dtype) -> None:
    k = 256
    m, n = (40, 128) if "tiles" in name else (40, 48)
    a, b = operands(name, m, n, k)
    got = scaled_matmul(moved(a, DEVICE), moved(b, DEVICE), dtype).cpu()
    assert got.dtype == dtype
    wide_a, wide_b = a.dequantize().double(), b.dequantize().double()
    wanted = wide_a @ wide_b.t()
    # K additions and the products with two scales in each block round, or are cut off, by at most 2^-23 of what has been summed, which is below |a| |b|^T.
    bound = (k + 8) * 2.0**-23 * (wide_a.abs() @ wide_b.abs().t()) + (2.0**-8 * wanted.abs() if dtype == torch.bfloat16 else 0.0)
    assert ((got.double() - wanted).abs() <= bound).all()
    assert (wanted.abs() > 100 * bound).double().mean() > 0.5 or dtype == torch.bfloat16, "the bound tells right from wrong"


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (3, 5, 48), (33, 2, 80), (130, 130, 16)])
def test_edges_that_no_tile_divides(m: int, n: int, k: int) -> None:
    for quantizers in (
        (Quantizer("e2m1", "block", 16, "floor"), Quantizer("e5m2", "block", 16, "floor")),
        (Quantizer("e2m1"), Quantizer("e4m3")),
    ):
        a, b = (
            pack_tensor((torch.arange(rows * k).view(rows, k) * 7 % 13 - 6).float(), q) for rows, q in zip((m, n), quantizers, strict=True)
        )
        got = scaled_matmul(moved(a, DEVICE), moved(b, DEVICE), torch.float32).cpu()
        torch.testing.assert_close(got, a.dequantize() @ b.dequantize().t(), rtol=1e-5, atol=1e-4)


def test_small_scales_do_not_vanish_together_and_what_is_no_number_stays_none() -> None:
    x = torch.full((4, 32), 2.0**-90)
    x[1] = math.nan
    y = torch.full((4, 32), 2.0**-50)
    for quantizer in (Quantizer("e4m3", "block", 32), Quantizer("e4m3"), Quantizer("e2m1", "block", 16, "floor")):
        got = scaled_matmul(moved(pack_tensor(x, quantizer), DEVICE), moved(pack_tensor(y, quantizer), DEVICE), torch.float32).cpu()
        assert got[1].isnan().all()
        torch.testing.assert_close(got[[0, 2, 3]].double(), torch.full((3, 4), 2.0**-135, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_weight_gradient_contracts_the_tokens() -> None:
    grad, x = (torch.randn(64, columns, generator=torch.Generator().manual_seed(columns)) for columns in (24, 40))
    quantizer = Quantizer("e4m3", "block", 32, "floor")
    got = scaled_matmul(quantize_columns(grad.to(DEVICE), quantizer), quantize_columns(x.to(DEVICE), quantizer), torch.float32).cpu()
    wanted = quantizer.emulate(grad.t().contiguous()) @ quantizer.emulate(x.t().contiguous()).t()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_has_no_product_is_refused() -> None:
    a, b = (pack_tensor(torch.ones(4, k), Quantizer("e4m3")) for k in (32, 48))
    with pytest.raises(ValueError, match=r"\[4, 32\] and \[4, 48\] have no product"):
        scaled_matmul(a, b)
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        scaled_matmul(a, a, torch.float16)
    small = pack_tensor(torch.ones(4, 32), Quantizer("e4m3", "block", 8))
    with pytest.raises(ValueError, match="scales for each 8 of the contracted dim"):
        scaled_matmul(small, a)
