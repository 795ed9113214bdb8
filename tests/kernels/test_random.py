"""Counter-based randomness: a value depends on its key and its index alone, and is random enough."""

import pytest
import torch

from regrowth.kernels.random import global_index, normal, random_bits, random_key, rounding_bits, uniform

MASK = 0xFFFFFFFFFFFFFFFF


def slow_bits(key: int, index: int) -> int:
    """splitmix64's finaliser in Python integers."""
    x = (index * 0x9E3779B97F4A7C15 + key) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def test_the_bits_are_splitmix64s() -> None:
    index = torch.tensor([0, 1, 2, 12345, 2**40, 2**62])
    for key in (0, 1, MASK, random_key(3, "init", name="embed.weight")):
        assert [b & MASK for b in random_bits(key, index).tolist()] == [slow_bits(key, i) for i in index.tolist()]


def test_a_part_is_the_part_of_the_whole() -> None:
    key = random_key(1, "noise", 7, "layers.3.ffn.w_up.weight")
    index = global_index((64, 48))
    whole = normal(key, index)
    assert torch.equal(normal(key, index[10:20, 5:7]), whole[10:20, 5:7])


def test_every_part_of_the_key_matters() -> None:
    keys = {random_key(s, p, t, n) for s in (0, 1) for p in ("init", "noise") for t in (0, 1) for n in ("a", "b")}
    assert len(keys) == 16


def test_uniforms_and_normals_have_their_moments_and_no_correlation() -> None:
    index = torch.arange(1_000_000)
    u, z = uniform(5, index), normal(6, index)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(z.mean()) < 4e-3 and abs(z.var() - 1) < 6e-3 and abs((z**4).mean() - 3) < 0.06
    assert abs((z[1:] * z[:-1]).mean()) < 4e-3
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 149  # chi-square, 99 degrees of freedom, 0.1%


@pytest.mark.parametrize("whole", [48, 47])
def test_bits_for_rounding_are_those_of_the_place_in_the_whole_whatever_the_slice(whole: int) -> None:
    rows = torch.tensor([5, 1 << 40, -3, 17])
    bits = rounding_bits(9, rows, whole)
    assert bits.dtype == torch.int32 and bits.unique().numel() == bits.numel()
    for first, columns in ((0, 16), (16, 16), (3, 8), (7, 1), (whole - 5, 5)):
        assert torch.equal(rounding_bits(9, rows[1:3], columns, whole, first), bits[1:3, first : first + columns])
    many = rounding_bits(9, torch.arange(4096), 64)
    ones = torch.stack([((many >> bit) & 1).double().mean() for bit in range(32)])
    assert ((ones - 0.5).abs() < 5 * 0.5 / many.numel() ** 0.5).all(), "every bit is even"
    neighbours = torch.corrcoef(torch.stack((many[:, ::2].flatten(), many[:, 1::2].flatten())).double())[0, 1]
    assert abs(neighbours.item()) < 5 / (many.numel() / 2) ** 0.5
