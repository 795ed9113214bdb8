"""Quantisers: the scale of every group is what its definition says, and the largest value survives."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from regrowth.kernels.formats import FORMATS, round_to
from regrowth.kernels.quantize import AmaxGroups, Quantizer
from regrowth.parallel.ranks import RankPool


def slow(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Group by group, in plain loops."""
    format = FORMATS[quantizer.format]  # type: ignore[index]
    out = x.clone()
    flat = out.view(-1, x.shape[-1])
    size = {"tensor": None, "row": x.shape[-1], "block": quantizer.block}[quantizer.granularity]
    groups = [flat] if size is None else [row[i : i + size] for row in flat for i in range(0, len(row), size)]
    for group in groups:
        scale = group.abs().max() / format.max
        if scale > 0:
            group.copy_(round_to(group / scale, format) * scale)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_scales_are_per_tensor_row_or_block(format: str, granularity: str) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)
    quantizer = Quantizer(format, granularity, block=16)  # type: ignore[arg-type]
    got = quantizer.emulate(x)
    assert torch.equal(got, slow(x, quantizer))
    assert got.abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)
    values, scale = quantizer.quantize(x)
    assert scale.numel() == {"tensor": 1, "row": 15, "block": 60}[granularity]
    assert torch.equal(round_to(values, FORMATS[format]), values)


def plain_scale(group: list[float], whole: float, quantizer: Quantizer) -> float:
    """The scale of a group by its rule, in Python's own arithmetic."""
    most, amax = FORMATS[quantizer.format].max, max(map(abs, group))  # type: ignore[index]
    if amax == 0:
        return 1.0
    if quantizer.scale == "floor":
        return 2.0 ** (math.floor(math.log2(amax)) - math.floor(math.log2(most)))
    if quantizer.scale == "ceil":
        return 2.0 ** math.ceil(math.log2(amax / most))
    of_tensor = torch.tensor(whole) / (most * 448.0)
    return float(torch.maximum((torch.tensor(amax) / most / of_tensor).to(torch.float8_e4m3fn).float(), torch.tensor(2.0**-9)) * of_tensor)


@pytest.mark.parametrize("granularity", ["block", "tile"])
@pytest.mark.parametrize("scale", ["floor", "ceil", "two_level"])
@pytest.mark.parametrize("format", FORMATS)
def test_scales_follow_their_rules(format: str, scale: str, granularity: str) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)
    x[0:16, 0:16] = 0.0
    quantizer = Quantizer(format, granularity, 16, scale)  # type: ignore[arg-type]
    got, (values, scales) = quantizer.emulate(x), quantizer.quantize(x)
    height = 16 if granularity == "tile" else 1
    assert scales.numel() == x.numel() // (16 * height)
    for top in range(0, 32, height):
        for left in range(0, 64, 16):
            group = x[top : top + height, left : left + 16]
            factor = plain_scale(group.flatten().tolist(), float(x.abs().max()), quantizer)
            expected = round_to(group / factor, FORMATS[format])
            assert torch.equal(values[top : top + height, left : left + 16], expected)
            assert torch.equal(got[top : top + height, left : left + 16], expected * factor)


def test_the_floor_rule_saturates_and_the_ceiling_rule_does_not() -> None:
    x = torch.full((1, 32), 7.0)  # between 6 and 8 times a power of two
    assert (Quantizer("e2m1", "block", 32, "floor").emulate(x) == 6.0).all()
    assert (Quantizer("e2m1", "block", 32, "ceil").emulate(x) == 8.0).all()  # 2 x 4, halfway to 2 x 3 and even
    exact = torch.tensor([[6.0, 3.0, 1.5, 0.75] * 8])
    assert Quantizer("e2m1", "block", 32, "ceil").scales(exact).item() == 1.0


def test_the_scales_of_two_levels_span_what_those_of_four_bits_alone_do_not() -> None:
    x = torch.tensor([[1000.0] * 16 + [0.001] * 16 + [0.0001] * 16 + [0.0] * 16])
    got = Quantizer("e2m1", "block", 16, "two_level").emulate(x)
    assert got[0, 0] == pytest.approx(1000.0, rel=1e-6) and (got[0, 48:] == 0).all()
    # The smallest scale is 2^-9 x 1000 / (6 x 448): a thousandth is one and a half times that, and a tenth of it less than half of a half.
    assert got[0, 16].item() == pytest.approx(1.5 * 2**-9 * 1000 / (6 * 448), rel=1e-6) and (got[0, 32:48] == 0).all()
    assert (Quantizer("e2m1", "tensor").emulate(x)[0, 16:] == 0).all()


def test_zeros_stay_zeros_and_nothing_becomes_nan() -> None:
    for granularity in ("tensor", "row", "block"):
        x = torch.zeros(4, 32)
        x[1] = 1e-30
        got = Quantizer("e2m1", granularity, 16).emulate(x)  # type: ignore[arg-type]
        assert torch.isfinite(got).all() and (got[0] == 0).all()


def round_a_slice(granularity: str, shared: bool) -> torch.Tensor:
    """This rank's columns of one tensor, rounded."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    group = dist.group.WORLD
    groups = AmaxGroups(row=group, tensor=group) if shared else None
    scale = "two_level" if granularity == "two_level" else "full"
    granularity = "block" if granularity == "two_level" else granularity
    return Quantizer("e4m3", granularity, 16, scale).emulate(x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()], groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["tensor", "row", "block", "two_level"])
def test_a_shared_amax_makes_a_split_tensor_round_as_the_whole(granularity: str, ranks: Callable[[int], RankPool]) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    two = granularity == "two_level"
    whole = Quantizer("e4m3", "block" if two else granularity, 16, "two_level" if two else "full").emulate(x)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(ranks(2).run(round_a_slice, granularity, True), dim=1), whole)
    apart = torch.cat(ranks(2).run(round_a_slice, granularity, False), dim=1)
    assert torch.equal(apart, whole) == (granularity == "block"), "a block never straddles a cut"


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 24 do not divide the contracted dim of 64"):
        Quantizer("e2m1", "block", 24).emulate(torch.ones(2, 64))
    with pytest.raises(ValueError, match="tiles of 16 do not divide the dim of 8"):
        Quantizer("e2m1", "tile", 16).emulate(torch.ones(8, 64))


def test_no_format_is_no_rounding() -> None:
    x = torch.randn(4)
    assert Quantizer(None).emulate(x) is x
