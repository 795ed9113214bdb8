"""Quantisers: the scale of every group is what its definition says, and the largest value survives."""

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
    return Quantizer("e4m3", granularity, 16).emulate(x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()], groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_a_shared_amax_makes_a_split_tensor_round_as_the_whole(granularity: str, ranks: Callable[[int], RankPool]) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    whole = Quantizer("e4m3", granularity, 16).emulate(x)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(ranks(2).run(round_a_slice, granularity, True), dim=1), whole)
    apart = torch.cat(ranks(2).run(round_a_slice, granularity, False), dim=1)
    assert torch.equal(apart, whole) == (granularity == "block"), "a block never straddles a cut"


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 24 do not divide the contracted dim of 64"):
        Quantizer("e2m1", "block", 24).emulate(torch.ones(2, 64))


def test_no_format_is_no_rounding() -> None:
    x = torch.randn(4)
    assert Quantizer(None).emulate(x) is x
