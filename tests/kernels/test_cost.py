"""Costs of recipes are FLOPs over speed, reckoned by hand for small numbers; and the published ordering comes out."""

from dataclasses import replace

import pytest

from regrowth.kernels.cost import SPEED, FlopShares, PassTimes, flop_shares, gemm_time, recipe_times
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.recipe import FULL, GemmPrecision, LinearPrecision, PrecisionRecipe
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.precision import load_recipe

FP4, FP8, HIGH = Quantizer("e2m1"), Quantizer("e4m3"), Quantizer(None)
LLAMA = ModelConfig(vocabulary=32_000, width=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn_width=5504, tied=False)


def everywhere(quantizer: Quantizer) -> PrecisionRecipe:
    gemm = GemmPrecision(quantizer, quantizer)
    linear = LinearPrecision(gemm, gemm, gemm)
    return PrecisionRecipe(name="everywhere", attention=linear, ffn=linear)


def test_a_product_runs_at_the_speed_of_its_wider_operand() -> None:
    for a, b, time in ((FP4, FP4, 0.25), (FP4, FP8, 0.5), (FP8, Quantizer("e5m2"), 0.5), (FP4, HIGH, 1.0), (HIGH, HIGH, 1.0)):
        assert gemm_time(GemmPrecision(a, b), SPEED) == gemm_time(GemmPrecision(b, a), SPEED) == time
    assert gemm_time(GemmPrecision(FP8, Quantizer("e5m2")), {"e4m3": 2.0}) == 1.0, "a format that is not named is no faster"
    assert gemm_time(GemmPrecision(FP4, FP8), {"e2m1": 1.5, "e4m3": 2.0}) == 0.5


def test_shares_are_those_of_a_count_by_hand() -> None:
    model = ModelConfig(vocabulary=10, width=4, layers=3, heads=2, kv_heads=1, head_dim=2, ffn_width=6, tied=False)
    # Multiply-adds of a token: q 16, k 8, v 8, output 16; gate, up, down 24 each; scores and values 5 x 4 each; the head 40.
    attention, ffn, core, head = 3 * 48, 3 * 72, 3 * 40, 40
    whole = attention + ffn + core + head
    shares = flop_shares(model, 5)
    assert (shares.attention, shares.ffn, shares.wide) == pytest.approx((attention / whole, ffn / whole, (core + head) / whole))


def test_times_are_those_of_a_count_by_hand() -> None:
    shares = FlopShares(attention=0.25, ffn=0.5, wide=0.25)
    times = recipe_times(load_recipe("fp4_paper"), shares, SPEED, 32)
    assert times == PassTimes(forward=0.25 / 2 + 0.5 / 4 + 0.25, dgrad=0.25 / 2 + 0.5 / 2 + 0.25, wgrad=0.625)
    assert times.step == pytest.approx((0.5 + 0.625 + 0.625) / 3)
    assert recipe_times(FULL, shares, SPEED, 32).step == recipe_times(load_recipe("fp4_paper"), shares, {}, 32).step == 1.0


def test_the_order_of_the_fp4_papers_cost_table() -> None:
    """arXiv 2502.11458: four bits everywhere, below FP8 attention, FP4 FFN and FP8 backward, below FP8 everywhere, below 16 bit."""
    shares = flop_shares(LLAMA, 2048)
    ordered = [recipe_times(r, shares, SPEED, 32).step for r in (everywhere(FP4), load_recipe("fp4_paper"), everywhere(FP8), FULL)]
    assert ordered == sorted(ordered) and len(set(ordered)) == 4
    assert ordered[0] == pytest.approx(0.25 + 0.75 * shares.wide), "what stays wide bounds the gain"


def test_blocks_that_stay_wide_cost_what_wide_ones_do() -> None:
    shares = FlopShares(attention=0.3, ffn=0.6, wide=0.1)
    all_narrow = everywhere(FP4)
    half = recipe_times(replace(all_narrow, first_wide=2, last_wide=0.25), shares, SPEED, layers=8)
    assert half.forward == pytest.approx((recipe_times(all_narrow, shares, SPEED, layers=8).forward + 1.0) / 2)
