"""Rounding is held to every representable value, to torch's own casts and to plain Python arithmetic."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.kernels.formats import E2M1, E4M3, E5M2, FORMATS, Format, round_to


def values(format: Format) -> list[float]:
    """Every non-negative value of a format, built from exponent and mantissa by hand."""
    found = [m * 2.0 ** (format.min_exponent - format.mantissa_bits) for m in range(2**format.mantissa_bits)]
    exponent = format.min_exponent
    while True:
        for m in range(2**format.mantissa_bits):
            value = (1 + m / 2**format.mantissa_bits) * 2.0**exponent
            if value > format.max:
                return found
            found.append(value)
        exponent += 1


def test_the_grids_are_the_standards_grids() -> None:
    assert values(E2M1) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(256, dtype=torch.uint8)
    for format, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        decoded = codes.view(dtype).float()
        assert sorted(set(decoded[torch.isfinite(decoded)].abs().tolist())) == values(format)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_every_value_and_every_midpoint_rounds_as_ieee_says(format: Format) -> None:
    grid = values(format)
    assert round_to(torch.tensor(grid), format).tolist() == grid
    assert round_to(-torch.tensor(grid), format).tolist() == [-v for v in grid]
    for index, (low, high) in enumerate(itertools.pairwise(grid)):
        middle = (low + high) / 2
        even = low if index % 2 == 0 else high  # codes alternate between even and odd mantissas
        below, above = torch.nextafter(torch.tensor([middle, middle]), torch.tensor([-1.0, 1e9])).tolist()
        assert round_to(torch.tensor([below, middle, above]), format).tolist() == [low, even, high]


@pytest.mark.parametrize(("format", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"])
def test_rounding_agrees_with_torchs_cast(format: Format, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), dtype=torch.int64, generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[torch.isfinite(x)].clamp(-format.max, format.max)
    got, expected = round_to(x, format), x.to(dtype).float()
    assert (got.view(torch.int32) == expected.view(torch.int32)).all(), "the sign of zero included"


def test_what_is_not_finite_and_what_is_too_large() -> None:
    for format in FORMATS.values():
        got = round_to(torch.tensor([math.inf, -math.inf, math.nan, 1e30, -0.0, 0.0]), format).tolist()
        assert got[:2] == [format.max, -format.max] and math.isnan(got[2]) and got[3] == format.max
        assert [math.copysign(1, v) for v in got[4:]] == [-1, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-600, 600, width=32), min_size=2, max_size=20), st.sampled_from(list(FORMATS.values())))
def test_rounding_is_idempotent_monotone_and_within_half_a_step(numbers: list[float], format: Format) -> None:
    x = torch.tensor(sorted(numbers))
    rounded = round_to(x, format)
    assert (round_to(rounded, format) == rounded).all()
    assert (rounded.diff() >= 0).all()
    inside = x.abs() <= format.max
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(2.0**format.min_exponent))) - format.mantissa_bits)
    assert ((rounded - x).abs()[inside] <= step[inside] / 2 * (1 + 1e-6)).all()
