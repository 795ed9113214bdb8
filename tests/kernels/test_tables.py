"""Delayed scales and errors of rounding: kept by linear and operand, joined over ranks."""

import math
from collections.abc import Callable

import pytest
import torch

from regrowth.kernels.gemm import Site
from regrowth.kernels.linear import LowPrecisionLinear
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.recipe import GemmPrecision, LinearPrecision
from regrowth.kernels.tables import AmaxHistory, RoundingErrors
from regrowth.parallel.ranks import RankPool

DELAYED = Quantizer("e4m3", "tensor", scale="delayed", history=2, margin=1)


def linear(history: AmaxHistory | None = None, errors: RoundingErrors | None = None) -> LowPrecisionLinear:
    made = LowPrecisionLinear(16, 16)
    made.precision = LinearPrecision(forward=GemmPrecision(DELAYED, DELAYED))
    made.site = Site("layers.0.ffn.w_up", history=history, errors=errors)
    with torch.no_grad():
        made.weight.copy_(torch.eye(16))
    return made


def test_a_scale_is_that_of_the_steps_before_with_room_above_and_values_beyond_it_saturate() -> None:
    history = AmaxHistory(["layers.0.ffn.w_up"], length=2)
    layer, x = linear(history), torch.ones(1, 16)
    assert (layer(x * 7.0) == 7.0).all(), "the first step has nothing but its own values"
    layer(x * 3.0)  # a smaller micro-batch of the same step
    history.end_step()
    most = 7.0 * 2  # margin 1
    assert layer(x * 100.0)[0, 0].item() == pytest.approx(most)
    history.end_step()
    assert layer(x * 150.0)[0, 0].item() == pytest.approx(150.0, rel=2**-4), "now a hundred is known, and room for twice as much"
    history.end_step()
    for _ in range(2):  # both large ones leave a history of two steps
        layer(x)
        history.end_step()
    assert layer(x * 50.0)[0, 0].item() == pytest.approx(2.0)


def test_evaluation_leaves_no_trace_and_a_step_that_overflowed_counts_for_nothing() -> None:
    history = AmaxHistory(["layers.0.ffn.w_up"], length=2)
    layer, x = linear(history), torch.ones(1, 16)
    with torch.no_grad():
        layer(x * 9.0)
    history.end_step()
    assert history.state_dict() == {}
    layer(x * math.inf)
    layer(x * math.nan)
    history.end_step()
    assert "forward.a" not in history.state_dict()["layers.0.ffn.w_up"]


def test_a_step_of_zeros_is_no_history() -> None:
    """A gradient that is zero in the first step, as those before a projection that begins at zero, must not set the scale of the next."""
    history = AmaxHistory(["layers.0.ffn.w_up"], length=2)
    layer, x = linear(history), torch.ones(1, 16)
    layer(x * 0.0)
    history.end_step()
    assert "forward.a" not in history.state_dict()["layers.0.ffn.w_up"]
    assert layer(x * 1e-3)[0, 0].item() == pytest.approx(1e-3, rel=2**-4)


def test_a_history_goes_into_plain_data_and_back() -> None:
    history = AmaxHistory(["layers.0.ffn.w_up", "layers.1.ffn.w_up"], length=2)
    layer = linear(history)
    for size in (1.0, 4.0):
        layer(torch.full((1, 16), size))
        history.end_step()
    state = history.state_dict()
    assert state == {"layers.0.ffn.w_up": {"forward.a": [4.0, 1.0], "forward.b": [1.0, 1.0]}}
    again = AmaxHistory(["layers.1.ffn.w_up", "layers.0.ffn.w_up"], length=3)
    again.load_state_dict(state)
    assert again.state_dict() == {"layers.0.ffn.w_up": {"forward.a": [4.0, 1.0, 0.0], "forward.b": [1.0, 1.0, 0.0]}}
    with pytest.raises(ValueError, match=r"has a linear layers\.0\.ffn\.w_up that the model has not"):
        AmaxHistory(["layers.7.ffn.w_up"], length=2).load_state_dict(state)
    with pytest.raises(ValueError, match="is not one"):
        again.load_state_dict({"layers.0.ffn.w_up": {"forward.a": ["large"]}})


def on_two_ranks() -> tuple[dict, dict]:  # type: ignore[type-arg]
    rank = torch.distributed.get_rank()
    history, errors = AmaxHistory(["layers.0.ffn.w_up"], 1), RoundingErrors(["layers.0.ffn.w_up"])
    linear(history, errors)(torch.linspace(0.1, 1.0 + rank, 16)[None])
    history.end_step()
    return history.state_dict(), errors.collect()


def test_ranks_know_of_each_other(ranks: Callable[[int], RankPool]) -> None:
    (first, errors), second = ranks(2).run(on_two_ranks)
    assert (first, errors) == second
    assert first["layers.0.ffn.w_up"]["forward.a"] == [2.0]
    x = torch.stack([torch.linspace(0.1, 1.0 + rank, 16) for rank in range(2)])
    rounded = torch.stack([DELAYED.emulate(row[None])[0] for row in x])
    expected = ((rounded - x).double().square().sum() / x.double().square().sum()).sqrt().item()
    assert errors["layers.0.ffn.w_up"]["forward.a"] == pytest.approx(expected, rel=1e-9)
    assert errors["layers.0.ffn.w_up"]["forward.b"] == 0.0, "ones and zeros are held"


def test_delayed_scales_are_of_tensors() -> None:
    with pytest.raises(ValueError, match='scale = "delayed" is defined for granularity = "tensor"'):
        Quantizer("e4m3", "row", scale="delayed")
