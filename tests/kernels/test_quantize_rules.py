"""What quantisers do besides rounding to nearest: rounding by chance, shrinking, clipping by deviation, outliers kept wide; and values that are none."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from regrowth.kernels.formats import E2M1, FORMATS, round_to
from regrowth.kernels.outliers import clamp_outliers, smallest
from regrowth.kernels.quantize import _BEST_CLIP, Granularity, Quantizer, Scale
from regrowth.kernels.random import global_index, random_bits, random_key
from regrowth.parallel.ranks import RankPool


def draws(shape: tuple[int, ...], step: int = 0) -> torch.Tensor:
    return random_bits(random_key(0, "rounding", step), global_index(shape))


def test_rounding_by_chance_is_right_in_the_mean_only_where_nothing_is_clipped() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x[0, :] = 7.5 * torch.linspace(0.1, 1, 32)  # between 6 and 8: the floor rule clips it
    clipping = Quantizer("e2m1", "block", 32, "floor", rounding="stochastic")
    shrinking = Quantizer("e2m1", "block", 32, "floor", rounding="stochastic", shrink=0.75)
    times = 4000
    means = [sum(q.emulate(x, random=draws((8, 32), step)).double() for step in range(times)) / times for q in (clipping, shrinking)]
    step_of_largest = shrinking.scales(x) * 2 / 0.75  # the widest step of four bits
    bound = 5 * step_of_largest / 2 / times**0.5  # five standard errors
    assert ((means[1] - x.double()).abs() <= bound.reshape(8, 1)).all()
    assert (means[0] - x.double())[0, -1] == pytest.approx(-1.5), "what was clipped to 6 stays there"


def test_random_bits_decide_and_nothing_else() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer("e4m3", "row", rounding="stochastic")
    once, again = (quantizer.emulate(x, random=draws((4, 32))) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, quantizer.emulate(x, random=draws((4, 32), step=1)))
    slices = [quantizer.emulate(x[i : i + 1], random=draws((4, 32))[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(slices), once)
    with pytest.raises(ValueError, match="needs random bits"):
        quantizer.emulate(x)


def squared_error(clip: float) -> float:
    """Of a standard normal variable rounded to four bits, whose largest value stands for `clip` deviations; by the midpoint rule."""
    x = torch.arange(-8, 8, 1e-4, dtype=torch.float64) + 5e-5
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    rounded = round_to((x * (E2M1.max / clip)).float(), E2M1).double() * (clip / E2M1.max)
    return float(((rounded - x) ** 2 * density).sum() * 1e-4)


def test_the_constant_of_the_rms_rule_is_where_a_normal_variables_error_is_smallest() -> None:
    best = _BEST_CLIP["e2m1"]
    assert squared_error(best) < min(squared_error(best - 0.02), squared_error(best + 0.02))


def test_the_rms_rule_takes_the_power_of_two_at_or_below_the_best_scale() -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 16)[:, None] + 0.1
    scales = Quantizer("e2m1", "block", 32, "rms").scales(x).flatten()
    wanted = [2.0 ** math.floor(math.log2(float(block.double().std(correction=0)) * _BEST_CLIP["e2m1"] / 6)) for block in x.view(-1, 32)]
    assert scales.tolist() == wanted
    assert (Quantizer("e2m1", "block", 32, "rms").emulate(torch.zeros(1, 32)) == 0).all()
    for wrong in ({"granularity": "row"}, {"format": "e4m3", "granularity": "block"}):
        with pytest.raises(ValueError, match='scale = "rms" is defined for'):
            Quantizer(**{"format": "e2m1", "scale": "rms", **wrong})  # type: ignore[arg-type]


def heavy_tailed() -> torch.Tensor:
    """Activations as they are met: normal, with a few channels a hundred times as large."""
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    x[:, ::64] *= 50.0
    return x


def quality(x: torch.Tensor, rounded: torch.Tensor) -> tuple[float, float]:
    """Cosine in per cent, and signal to noise in decibels."""
    cosine = torch.cosine_similarity(x.flatten().double(), rounded.flatten().double(), dim=0)
    return 100 * cosine.item(), (10 * torch.log10(x.double().square().sum() / (x - rounded).double().square().sum())).item()


def test_outliers_kept_wide_save_the_rest_in_the_order_of_the_paper() -> None:
    """arXiv 2501.17116, table 1: no clamp, clamped at .999, compensated at .999, compensated at .97; cosine and noise get better in this order."""
    x = heavy_tailed()
    fp4 = Quantizer("e2m1", "tensor")
    plain = quality(x, fp4.emulate(x))
    kept = {a: quality(x, Quantizer("e2m1", "tensor", outliers=a).emulate(x)) for a in (0.999, 0.99, 0.97)}
    clamped = quality(x, fp4.emulate(clamp_outliers(x, 0.999)[0]))
    assert clamped[0] < kept[0.999][0] < kept[0.99][0] < kept[0.97][0] and plain[0] < kept[0.99][0]
    assert plain[1] < kept[0.999][1] < kept[0.99][1] < kept[0.97][1] and clamped[1] < kept[0.999][1]
    assert kept[0.97][0] > 99.5


def test_what_is_clamped_and_what_is_cut_off_are_the_whole() -> None:
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    inside, beyond = clamp_outliers(x, 0.99)
    assert torch.equal(inside + beyond, x)
    assert (beyond > 0).sum() == (beyond < 0).sum() == 100, "one in a hundred on either side"
    empty = clamp_outliers(torch.zeros(0, 4), 0.99)
    assert empty[0].shape == empty[1].shape == (0, 4)


def clamp_a_slice() -> tuple[torch.Tensor, torch.Tensor]:
    group = dist.group.WORLD
    mine = heavy_tailed().chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    mine[3, :5] = torch.tensor([0.0, -0.0, 1e-42, -1e-42, -3e38])
    ranks = torch.stack([smallest(mine, rank, group) for rank in (1, 2, 30_000, 65_536, 65_540, 131_072)])
    return clamp_outliers(mine, 0.99, group)[0], ranks


def test_quantiles_of_a_tensor_in_slices_are_those_of_the_whole(ranks: Callable[[int], RankPool]) -> None:
    x = heavy_tailed()
    for left in (0, 128):
        x[3, left : left + 5] = torch.tensor([0.0, -0.0, 1e-42, -1e-42, -3e38])
    parts = ranks(2).run(clamp_a_slice)
    assert torch.equal(torch.cat([inside for inside, _ in parts], dim=1), clamp_outliers(x, 0.99)[0])
    by_order = x.flatten().sort().values[[0, 1, 29_999, 65_535, 65_539, 131_071]]
    assert all(torch.equal(found, by_order) for _, found in parts)


@pytest.mark.parametrize("scale", ["full", "floor", "ceil", "two_level"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block", "tile"])
@pytest.mark.parametrize("format", FORMATS)
def test_values_that_are_none_are_loud_and_tiny_ones_are_not(format: str, granularity: Granularity, scale: Scale) -> None:
    quantizer = Quantizer(format, granularity, 16, scale)  # type: ignore[arg-type]
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    clean = quantizer.emulate(x)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        spoilt[20, 20] = bad
        got = quantizer.emulate(spoilt)
        group = {"tensor": x >= -99.0, "row": torch.arange(32)[:, None] == 20, "tile": torch.arange(32)[:, None] >= 16}.get(granularity)
        whole = torch.ones_like(x, dtype=torch.bool) if scale == "two_level" else group
        assert got[20, 20].isnan() and got[20, 16:].isnan().all()
        if whole is not None:
            assert got[whole & (torch.arange(32) >= 16)].isnan().all()
        elsewhere = got[0, :16]
        assert elsewhere.isnan().all() if scale == "two_level" or granularity == "tensor" else torch.equal(elsewhere, clean[0, :16])
    for tiny in (0.0, -0.0, 1e-45, -1e-40):
        assert quantizer.emulate(torch.full((32, 32), tiny)).isfinite().all()


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outliers = 0\.3 is no upper quantile"):
        Quantizer("e2m1", outliers=0.3)
    with pytest.raises(ValueError, match=r"shrink = 1\.5 is not above 0 and at most 1"):
        Quantizer("e2m1", shrink=1.5)
