"""Weights gathered in eight bits: fewer bytes, and not a bit of difference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.recipe import GemmPrecision, LinearPrecision
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.narrow_gather import decode, encode, narrow_weight
from regrowth.parallel.native_engine import NativeEngine
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.ranks import RankPool
from regrowth.pretrain.build import build_engine
from regrowth.pretrain.config import RunSettings
from regrowth.pretrain.conformance import MODELS, Setting, made_up_batch, run_forward, run_step
from regrowth.pretrain.loss import training_report
from regrowth.pretrain.precision import load_recipe

Ranks = Callable[[int], RankPool]


class Gathered(TorchDispatchMode):
    """Counts what this rank sends in gathers, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith("_allgather_base_"):
            self.sent += args[1].numel() * args[1].element_size()
        return func(*args, **(kwargs or {}))


def told_plan(plan: dict[str, Any]) -> ParallelPlan:
    return ParallelPlan.model_validate({"micro_batch": 4, **plan})


def train(setting: Setting, wide_from: int, alter: str = "") -> tuple[list[float], list[torch.Tensor], list[int]]:
    """Losses, this rank's weights at the end and the bytes gathered of four steps, the last ones from `wide_from` on under no recipe."""
    mesh, model = Mesh(setting.parallel, torch.device("cpu")), MODELS[setting.model]
    engine = build_engine(setting, model, mesh)
    assert isinstance(engine, NativeEngine)
    recipe = load_recipe(setting.recipe)
    losses, sent = [], []
    for step in range(4):
        for module in engine.modules:
            module.follow(recipe if step < wide_from else load_recipe("full"), seed=1, step=step)  # pyright: ignore[reportCallIssue]
        batch = made_up_batch(step, model.vocabulary, setting.loader)
        if alter and step == 1:
            with torch.no_grad():
                weight = dict(engine.held)["layers.1.ffn.w_up.weight"]
                weight.view(-1)[: 1 if mesh.data_rank == 0 else 0] = float(alter)
        with Gathered() as gathered:
            losses.append(run_step(engine, batch, torch.device("cpu")))
        sent.append(gathered.sent)
        engine.step(3e-3, clip=1.0)
    return losses, [weight.detach().clone() for weight in engine.held.values()], sent


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [({"dp_shard": 2, "micro_batch": 2}, "float32"), ({"dp_shard": 2, "tp": 2}, "bfloat16"), pytest.param({"dp_shard": 4, "reshard_after_forward": False}, "bfloat16", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_narrow_gather_changes_nothing_but_the_bytes_and_ends_when_the_recipe_does(
    plan: dict[str, Any], dtype: str, ranks: Ranks
) -> None:
    run = RunSettings.model_validate({"seed": 6, "device": "cpu", "dtype": dtype})
    setting = Setting("dense", "fp8_tensorwise", run=run)
    pool = ranks(told_plan(plan).world_size)
    told = {
        gather: pool.run(train, replace(setting, parallel=told_plan({**plan, "gather": gather})), wide_from=3)
        for gather in ("wide", "narrow")
    }
    for wide, narrow in zip(told["wide"], told["narrow"], strict=True):
        assert wide[0] == narrow[0] and all(map(torch.equal, wide[1], narrow[1]))
        # Of every linear's weights a rank sends its shard, once for each pass of each micro-batch, and a second time where they were freed between the passes.
        model, its = MODELS["dense"], told_plan(plan)
        shard = model.layers * (4 * model.width**2 + 3 * model.width * model.ffn_width) // its.world_size
        gathers = setting.loader.global_batch // (its.data_ranks * its.micro_batch) * (2 if its.reshards else 1)
        saved = shard * gathers * ({"float32": 4, "bfloat16": 2}[dtype] - 1)
        assert [a - b for a, b in zip(wide[2], narrow[2], strict=True)] == [saved] * 3 + [0]


def switch(setting: Setting) -> list[float]:
    """Losses of steps between evaluations, by recipes in turns."""
    mesh, model = Mesh(setting.parallel, torch.device("cpu")), MODELS[setting.model]
    engine = build_engine(setting, model, mesh)
    losses = []
    for step in range(5):
        for module in engine.modules:
            module.follow(load_recipe("full" if step % 2 else setting.recipe), seed=1, step=step)  # pyright: ignore[reportCallIssue]
        losses.append(run_step(engine, made_up_batch(step, model.vocabulary, setting.loader), torch.device("cpu")))
        engine.step(3e-3, clip=1.0)
        sums = run_forward(engine, made_up_batch(1 << 20, model.vocabulary, setting.loader), training_report, torch.device("cpu")).sum(0)
        losses.append(float(sums[0] / sums[1]))
    return losses


def test_recipes_change_behind_evaluations_that_leave_weights_gathered(ranks: Ranks) -> None:
    told = [
        ranks(2).run(
            switch,
            Setting("dense", "fp8_tensorwise", parallel=told_plan({"dp_shard": 2, "reshard_after_forward": False, "gather": gather})),
        )[0]
        for gather in ("wide", "narrow")
    ]
    assert told[0] == told[1]


def test_ranks_that_do_not_divide_a_weight_evenly(ranks: Ranks) -> None:
    """32 rows over 3 ranks: FSDP fills the last shard up."""
    setting = Setting("dense", "fp8_tensorwise", loader=replace(Setting().loader, global_batch=12))
    told = [
        ranks(3).run(train, replace(setting, parallel=told_plan({"dp_shard": 3, "gather": gather})), 4) for gather in ("wide", "narrow")
    ]
    assert told[0][0][0] == told[1][0][0] and sum(told[1][0][2]) < 0.6 * sum(told[0][0][2])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_as_loud_as_ever(value: str, ranks: Ranks) -> None:
    setting = Setting("dense", "fp8_tensorwise", parallel=told_plan({"dp_shard": 2, "gather": "narrow"}))
    losses = ranks(2).run(train, setting, 4, value)[0][0]
    assert losses[0] == losses[0] and losses[1] != losses[1]


def test_which_recipes_round_a_weight_once() -> None:
    assert [name for name in ("fp8_tensorwise", "fp8_rowwise", "fp8_delayed", "fp8_deepseek", "fp4_paper", "nvfp4", "mxfp4_quartet", "bf16")
            if narrow_weight(load_recipe(name).ffn)] == ["fp8_tensorwise"]  # fmt: skip
    tensor = Quantizer("e4m3", "tensor")
    both = LinearPrecision(GemmPrecision(tensor, tensor), GemmPrecision(Quantizer("e5m2", "tensor"), tensor))
    assert narrow_weight(both) == tensor
    for changed in (
        replace(both, dgrad=GemmPrecision()),
        replace(both, forward=replace(both.forward, hadamard=16)),
        replace(both, forward=replace(both.forward, b=replace(tensor, rounding="stochastic"))),
        replace(both, dgrad=replace(both.dgrad, b=replace(tensor, shrink=0.75))),
    ):
        assert narrow_weight(changed) is None


@pytest.mark.parametrize("format", ["e2m1", "e4m3", "e5m2"])
def test_codes_hold_every_value_of_a_format(format: Any) -> None:
    quantizer, weight = Quantizer(format, "tensor"), torch.randn(64, 48, generator=torch.Generator().manual_seed(1)) * 3
    codes, scale = encode(weight, quantizer, weight.abs().amax())
    assert codes.dtype == torch.uint8 and torch.equal(decode(codes, scale, quantizer, torch.float32), quantizer.emulate(weight))
