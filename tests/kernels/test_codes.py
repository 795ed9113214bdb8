"""Codes of narrow formats: every code, against torch's own types; and rounding up or down by chance."""

import itertools
import math

import pytest
import torch

from regrowth.kernels.formats import (
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    Format,
    decode,
    decode_power,
    encode,
    encode_power,
    pack,
    round_stochastic,
    round_to,
    unpack,
)
from regrowth.kernels.random import global_index, random_bits, random_key
from tests.kernels.test_formats import values

ALL = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize(("format", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"])
def test_every_code_of_eight_bits_is_torchs(format: Format, dtype: torch.dtype) -> None:
    got, expected = decode(ALL, format), ALL.view(dtype).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(got), torch.signbit(expected)) or bool(expected.isnan().any())
    held = ALL[expected.isfinite()]
    assert torch.equal(encode(decode(held, format), format), held), "the sign of zero included"
    assert encode(torch.tensor([math.nan]), format).view(dtype).float().isnan().all()


def test_every_code_of_four_bits_and_two_to_a_byte() -> None:
    codes = ALL[:16]
    assert decode(codes, E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(encode(decode(codes, E2M1), E2M1), codes)
    packed = pack(codes.reshape(2, 8))
    assert packed.shape == (2, 4) and packed[0].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert torch.equal(unpack(packed), codes.reshape(2, 8)) and torch.equal(pack(unpack(ALL)), ALL)
    with pytest.raises(ValueError, match="no code for NaN"):
        encode(torch.tensor([math.nan]), E2M1)
    with pytest.raises(ValueError, match="the last dim of 3 is odd"):
        pack(codes[:3])


def test_every_power_of_two_is_torchs_and_scales_go_down_or_up_to_one() -> None:
    powers = decode_power(ALL)
    torch.testing.assert_close(powers, ALL.view(torch.float8_e8m0fnu).float(), rtol=0, atol=0, equal_nan=True)
    whole = powers[:255]
    assert torch.equal(encode_power(whole), ALL[:255]) and torch.equal(encode_power(whole, up=True), ALL[:255])
    above = whole[:254] * 1.5
    assert torch.equal(encode_power(above), ALL[:254]) and torch.equal(encode_power(above, up=True), ALL[1:255])
    odd = torch.tensor([0.0, -1.0, math.inf, math.nan, 3e38])
    assert encode_power(odd).tolist() == [0, 255, 255, 255, 254] and encode_power(odd, up=True)[-1] == 254


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_chance_rounds_to_a_neighbour_and_is_right_in_the_mean(format: Format) -> None:
    grid = torch.tensor(values(format))
    every = torch.arange(1 << 12) << (23 - format.mantissa_bits - 12)  # random bits evenly over all that are dropped
    for low, high in itertools.islice(itertools.pairwise(grid.tolist()), 0, None, max(1, len(grid) // 24)):
        for part in (0.25, 0.4990234375, 0.75):
            x = torch.full((1 << 12,), low + part * (high - low))
            for sign in (1.0, -1.0):
                got = round_stochastic(sign * x, format, every)
                assert set(got.tolist()) <= {sign * low, sign * high}
                assert float((got * sign == high).double().mean()) == pytest.approx(part, abs=2**-11)
    bits = random_bits(random_key(0, "test"), global_index((len(grid),)))
    assert torch.equal(round_stochastic(grid, format, bits), grid), "what the format holds stays"


def test_chance_saturates_keeps_nan_and_the_sign_of_zero() -> None:
    for format in FORMATS.values():
        bits = torch.full((6,), -1)
        got = round_stochastic(torch.tensor([math.inf, -math.inf, math.nan, 1e30, -0.0, 1e-30]), format, bits)
        assert got[:2].tolist() == [format.max, -format.max] and got[2].isnan() and got[3] == format.max
        assert torch.signbit(got[4]) and got[4] == 0 and got[5] == 0


def test_the_mean_of_many_roundings_is_the_value_where_the_nearest_is_off() -> None:
    x = torch.full((1 << 16,), 0.3)
    bits = random_bits(random_key(1, "test"), global_index(x.shape))
    got = round_stochastic(x, E2M1, bits)
    assert float(got.mean()) == pytest.approx(0.3, abs=0.004) and float(round_to(x, E2M1).mean()) == 0.5
    parts = [round_stochastic(x[part], E2M1, bits[part]) for part in (slice(0, 1000), slice(1000, None))]
    assert torch.equal(torch.cat(parts), got), "the same under every split"
