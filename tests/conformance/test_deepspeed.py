"""A second engine on the same edge: DeepSpeed's ZeRO-1 trains as ours does, and goes on from our checkpoints, and we from its."""

from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.config import RunSettings
from regrowth.pretrain.conformance import Setting, continue_elsewhere, train
from tests.conformance.test_plans import Ranks

pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
ZERO = ParallelPlan(dp_shard=2, micro_batch=4, engine="deepspeed")
NATIVE = ParallelPlan(dp_shard=2, micro_batch=4)


@pytest.mark.parametrize("model", ["tied", "moe_sigmoid"])
def test_zero_1_gives_the_losses_of_the_native_engine_over_20_steps(model: str, ranks: Ranks) -> None:
    ours, theirs = (ranks(2).run(train, Setting(model, steps=20, parallel=plan))[0] for plan in (NATIVE, ZERO))
    assert_allclose(theirs.losses, ours.losses, rtol=1e-6)
    assert_allclose(theirs.norms, ours.norms, rtol=1e-4)
    assert_allclose(theirs.validation, ours.validation, rtol=1e-6)
    assert theirs.loads == ours.loads


@pytest.mark.slow
def test_zero_1_in_bfloat16_stays_with_the_native_engine(ranks: Ranks) -> None:
    run = RunSettings(seed=6, device="cpu", dtype="bfloat16")
    ours, theirs = (ranks(2).run(train, Setting("dense", steps=20, parallel=plan, run=run))[0] for plan in (NATIVE, ZERO))
    assert_allclose(theirs.losses, ours.losses, rtol=1e-2)
    assert ours.losses[-1] < ours.losses[0] - 0.1


@pytest.mark.parametrize(("saved", "loaded"), [(NATIVE, ZERO), (ZERO, NATIVE), (ZERO, ZERO)], ids=["to", "from", "within"])
def test_a_checkpoint_is_carried_from_one_engine_into_the_other(
    saved: ParallelPlan, loaded: ParallelPlan, ranks: Ranks, tmp_path: Path
) -> None:
    straight = train(Setting("tied", steps=6, parallel=ParallelPlan(micro_batch=4))).losses
    first = ranks(2).run(continue_elsewhere, Setting("tied", parallel=saved), tmp_path / "step-3", True, 3)[0]
    second = ranks(2).run(continue_elsewhere, Setting("tied", parallel=loaded), tmp_path / "step-3", False, 3)[0]
    assert_allclose([*first, *second], straight, rtol=1e-6)
