"""Fused kernels give what the plain operators and the reference's quantiser give: every bit where their arithmetic is exact, else a neighbouring code."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from regrowth.kernels.formats import FORMATS, unpack
from regrowth.kernels.hadamard import hadamard, random_signs
from regrowth.kernels.packed import Packed, pack_tensor
from regrowth.kernels.pointwise import rms_norm
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.random import rounding_bits

pytest.importorskip("triton")

from regrowth.kernels.triton_fused import rms_norm_quantize, swiglu_quantize
from regrowth.kernels.triton_quantize import Operand
from tests.kernels.test_triton_quantize import DEVICE, assert_same

QUANTIZERS = [
    Quantizer("e4m3", "block", 32, "floor"),
    Quantizer("e2m1", "block", 16, "ceil", shrink=0.75),
    Quantizer("e5m2", "block", 16),
    Quantizer("e2m1", "tile", 16, "rms"),
]


def ordinals(packed: Packed) -> torch.Tensor:
    """Codes as integers in the order of their values: neighbours are one apart."""
    bits = FORMATS[packed.quantizer.format].bits  # type: ignore[index]
    codes = (unpack(packed.codes) if bits == 4 else packed.codes).cpu().int()
    magnitude = codes & ((1 << (bits - 1)) - 1)
    return torch.where(codes >> (bits - 1) == 1, -magnitude, magnitude)


def assert_near(got: Packed, wanted: Packed, seldom: float) -> None:
    """The same codes but for neighbours, and few of those; the same scales, but for last bits of those in fp32."""
    apart = (ordinals(got) - ordinals(wanted)).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() <= seldom
    torch.testing.assert_close(got.scale_values().cpu(), wanted.scale_values(), rtol=1e-6 if seldom < 0.02 else 0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_swiglu_is_that_of_the_plain_operators(quantizer: Quantizer, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(48, 96, generator=torch.Generator().manual_seed(i)).to(dtype) * 3 for i in range(2))
    got = swiglu_quantize(gate.to(DEVICE), up.to(DEVICE), quantizer)
    assert_near(got, pack_tensor(functional.silu(gate) * up, quantizer), seldom=0.01 if dtype == torch.float32 else 0.02)
    # exp(-g) vanishes beside 1 from 18 on, and 0 stays 0
    exact = torch.where(gate.abs() > 1, gate.abs() * 20 + 20, torch.zeros_like(gate))
    assert_same(swiglu_quantize(exact.to(DEVICE), up.to(DEVICE), quantizer), pack_tensor(functional.silu(exact) * up, quantizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, Quantizer("e4m3")], ids=str)
def test_rms_norm_is_that_of_the_plain_operator(quantizer: Quantizer, dtype: torch.dtype) -> None:
    x, weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0)).to(dtype) * 5, torch.linspace(0.5, 2, 96)
    got = rms_norm_quantize(x.to(DEVICE), weight.to(DEVICE), 1e-6, quantizer)
    assert_near(got, pack_tensor(rms_norm(x, weight, 1e-6), quantizer), seldom=0.01 if dtype == torch.float32 else 0.02)
    exact = (x[:, :64].sign() * 4.0).to(dtype)  # squares, their mean and its root are powers of two
    exact[::2] /= 32
    assert_same(
        rms_norm_quantize(exact.to(DEVICE), weight[:64].to(DEVICE), 0.0, quantizer),
        pack_tensor(rms_norm(exact, weight[:64], 0.0), quantizer),
    )


def test_transforms_and_chance_go_along() -> None:
    quantizer = Quantizer("e2m1", "block", 16, "floor", "stochastic", 0.75)
    operand = Operand(quantizer, 16, random_signs(16, 3), key=9)
    bits = rounding_bits(9, torch.arange(48), 64)
    gate, up = torch.full((48, 64), 30.0), torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    wanted = pack_tensor(hadamard(functional.silu(gate) * up, 16, operand.signs), quantizer, random=bits)
    assert_same(swiglu_quantize(gate.to(DEVICE), up.to(DEVICE), operand), wanted)
    x, weight = up.sign() * 2, torch.linspace(0.5, 2, 64)
    wanted = pack_tensor(hadamard(rms_norm(x, weight, 0.0), 16, operand.signs), quantizer, random=bits)
    assert_same(rms_norm_quantize(x.to(DEVICE), weight.to(DEVICE), 0.0, operand), wanted)


def test_values_that_are_none_are_loud() -> None:
    x, quantizer = torch.ones(16, 64, device=DEVICE), Quantizer("e4m3", "block", 32, "floor")
    for bad, plain in itertools.product((math.nan, math.inf), (True, False)):
        spoilt = x.clone()
        spoilt[3, 40] = bad
        packed = (
            swiglu_quantize(spoilt, x, quantizer) if plain else rms_norm_quantize(spoilt, torch.ones(64, device=DEVICE), 1e-6, quantizer)
        )
        got = packed.dequantize()
        assert got[3, 32:].isnan().all() and got[:3].isfinite().all() and got[4:].isfinite().all()


def test_what_they_do_not_take_is_refused() -> None:
    x, quantizer = torch.ones(4, 32), Quantizer("e4m3", "block", 16)
    with pytest.raises(ValueError, match="are not alike"):
        swiglu_quantize(x, x.bfloat16(), quantizer)
    for wide in (Quantizer("e4m3"), Quantizer("e2m1", "block", 16, "two_level")):
        with pytest.raises(ValueError, match="see a tile alone"):
            swiglu_quantize(x, x, wide)
    with pytest.raises(ValueError, match="one weight a column"):
        rms_norm_quantize(x, torch.ones(4), 1e-6, quantizer)
    with pytest.raises(ValueError, match="take matrices"):
        rms_norm_quantize(x[0], torch.ones(32), 1e-6, quantizer)
    assert swiglu_quantize(x[:0], x[:0], quantizer).codes.shape == (0, 32)
