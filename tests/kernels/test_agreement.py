"""Our reference beside other libraries, value by value. Where one differs, the test says which values differ, and why.

ml_dtypes and torch round single values; for whole tensors see test_agreement_torchao.py.
"""

import math

import numpy as np
import pytest
import torch

from regrowth.kernels.formats import E2M1, E4M3, E5M2, FORMATS, Format, decode, encode, encode_power, round_to
from regrowth.kernels.quantize import Quantizer
from tests.kernels.test_formats import values

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, whose rounding is compared with ours, is in the dev extra")
THEIRS = {"e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
TORCHS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # NumPy says so of NaN to E2M1


def numbers() -> torch.Tensor:
    """All fp16 and bf16 bit patterns, every midpoint of every format with the fp32 values beside it, and a million fp32 bit patterns by chance."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    parts = [patterns.view(torch.float16).float(), patterns.view(torch.bfloat16).float()]
    for format in FORMATS.values():
        grid = torch.tensor([*values(format), 2 * values(format)[-1] - values(format)[-2]])  # and the first that is none
        middle = (grid[1:] + grid[:-1]) / 2
        parts += [middle, torch.nextafter(middle, torch.zeros(())), torch.nextafter(middle, torch.full((), math.inf))]
    random = torch.randint(-(2**31), 2**31, (1_000_000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([*parts, random.to(torch.int32).view(torch.float32)])
    return torch.cat([x, -x])


def differs(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Where two fp32 tensors are not the same, bit by bit; any NaN is as good as another."""
    return (ours.contiguous().view(torch.int32) != theirs.contiguous().view(torch.int32)) & ~(ours.isnan() & theirs.isnan())


def overflow(x: torch.Tensor, format: Format) -> torch.Tensor:
    """What IEEE rounding without saturation would carry past the largest value: beyond the midpoint to the next, and that itself where the next is even."""
    beyond = format.max + 2.0 ** (math.floor(math.log2(format.max)) - format.mantissa_bits) / 2
    return x.abs() >= beyond if format is E5M2 else x.abs() > beyond


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_rounding_agrees_with_ml_dtypes(format: Format) -> None:
    x = numbers()
    theirs = torch.from_numpy(x.numpy().astype(THEIRS[format.name]).astype(np.float32))
    wrong = differs(round_to(x, format), theirs)
    if format is E2M1:  # has no NaN: ours is left for the scale to carry, theirs becomes a zero
        assert torch.equal(wrong, x.isnan()) and (theirs[wrong] == 0).all()
    else:  # theirs do not saturate: E4M3 overflows to NaN, E5M2 to infinity, infinities included
        assert torch.equal(wrong, overflow(x, format))
        assert (
            theirs[wrong].isnan().all() if format is E4M3 else torch.equal(theirs[wrong], torch.copysign(torch.tensor(math.inf), x[wrong]))
        )


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_rounding_agrees_with_torchs_cast_of_all_dtypes(format: Format) -> None:
    for x in (numbers(), numbers().half(), numbers().bfloat16()):
        theirs = x.to(TORCHS[format.name]).float()
        wrong = differs(round_to(x, format), theirs)
        # The cast to E5M2 overflows to infinity. That to E4M3 saturates since torch 2.12, and gave NaN before.
        assert (wrong <= overflow(x.float(), format)).all() and not theirs[wrong].isfinite().any()
        assert bool(wrong.any()) or format is E4M3


def test_fp64_is_rounded_to_fp32_first_by_all() -> None:
    """1 + 1/4 + 1e-12 is above a midpoint of E2M1, and on it in fp32: rounded twice, everywhere."""
    x = torch.tensor([1.25 + 1e-12, 0.25 + 1e-15], dtype=torch.float64)
    assert round_to(x, E2M1).tolist() == [1.0, 0.0] == x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(float).tolist()
    above = torch.tensor([17 + 1e-12], dtype=torch.float64)
    assert (
        round_to(above, E4M3).item()
        == above.to(torch.float8_e4m3fn).item()
        == float(above.numpy().astype(ml_dtypes.float8_e4m3fn)[0])
        == 16
    )


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_codes_agree_with_ml_dtypes(format: Format) -> None:
    codes = np.arange(2**format.bits, dtype=np.uint8)
    theirs = torch.from_numpy(codes.view(THEIRS[format.name]).astype(np.float32))
    ours = decode(torch.from_numpy(codes), format)
    assert not differs(ours, theirs).any()
    held = ours.isfinite()
    assert torch.equal(encode(theirs[held], format), torch.from_numpy(codes)[held])


def test_powers_of_two_agree_and_what_lies_between_goes_to_the_nearest_with_others() -> None:
    """A cast to E8M0 rounds to nearest, midpoints up. A scale must not: which side it falls on decides whether values saturate; so we round down, or up."""
    generator = torch.Generator().manual_seed(0)
    binade = torch.exp2(torch.arange(-126, 127).float())[:, None]
    x = (binade * (1 + torch.rand(1, 500, generator=generator))).clamp_max(2.0**127)
    x = torch.cat([binade, 1.5 * binade, torch.nextafter(1.5 * binade, torch.zeros(())), x], dim=1).flatten()
    down, up = encode_power(x).int(), encode_power(x, up=True).int()
    nearest = torch.where(x / torch.exp2(down - 127.0) < 1.5, down, up)
    assert torch.equal(x.to(torch.float8_e8m0fnu).view(torch.uint8).int(), nearest)
    assert torch.equal(torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)).int(), nearest)
    # Without a code of their own: zero is the smallest power with us and torch, NaN with ml_dtypes; torch drops the sign; past 1.5 x 2^127 both go to NaN.
    odd = torch.tensor([0.0, -1.0, math.inf, math.nan, 3e38])
    assert encode_power(odd).tolist() == [0, 255, 255, 255, 254]
    assert odd.to(torch.float8_e8m0fnu).view(torch.uint8).tolist() == [0, 127, 255, 255, 255]
    assert odd.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist() == [255, 255, 255, 255, 255]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("up", [False, True], ids=["floor", "ceil"])
def test_scales_beside_powers_of_two_are_those_of_exact_arithmetic(format: Format, up: bool) -> None:
    """2^floor(log2 amax) / 2^floor(log2 max), or 2^ceil(log2(amax / max)), in Python's integers; also where the quotient is too small for fp32 to hold."""
    over = format.max if up else 2.0 ** math.floor(math.log2(format.max))
    at = torch.tensor([m * 2.0**e for e in range(-140, 126) for m in (1.0, 1.5, 1.75)])
    amax = torch.cat([torch.nextafter(at, torch.zeros(())), at, torch.nextafter(at, torch.full((), math.inf))])

    def exact(value: float) -> int:
        top, bottom = value.as_integer_ratio()
        top, bottom = top, bottom * int(over)
        k = top.bit_length() - bottom.bit_length() - 1  # 2^k is below the quotient
        while top >= bottom * 2 ** (k + 1) if k + 1 >= 0 else top * 2 ** -(k + 1) >= bottom:
            k += 1
        held = top == bottom * 2**k if k >= 0 else top * 2**-k == bottom
        return min(max(k + (up and not held), -127), 127)

    scales = Quantizer(format.name, "block", 1, "ceil" if up else "floor").scales(amax[:, None]).flatten()  # type: ignore[arg-type]
    assert scales.log2().int().tolist() == [exact(value) for value in amax.tolist()]
