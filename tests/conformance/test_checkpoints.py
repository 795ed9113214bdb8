"""A checkpoint belongs to no plan: saved under any, it goes on under any other as if nothing had happened."""

from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.conformance import Setting, continue_elsewhere, train
from tests.conformance.test_plans import Ranks

STEPS = 3
PLANS = {
    "one": {},
    "dp_replicate": {"dp_replicate": 2},
    "dp_shard": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp": {"tp": 2},
    "pp": {"pp": 2},
    "pp v": {"pp": 2, "schedule": "zbv_zero_bubble"},
    "dp_shard tp": {"dp_shard": 2, "tp": 2},
    "cp pp": {"cp": 2, "pp": 2},
    "ep": {"dp_shard": 4, "ep": 2},
    "dp_shard tp pp": {"dp_shard": 2, "tp": 2, "pp": 2},
}
WAYS = [("moe_sigmoid", "ep", "tp"), ("tied", "dp_shard tp", "pp")]
LONG = [("tied", a, b) for a in PLANS for b in PLANS if a != "ep" and b != "ep" and a != b and ("tied", a, b) not in WAYS]
LONG.append(("moe_sigmoid", "cp pp", "ep"))


@pytest.mark.parametrize(
    ("model", "saved", "loaded"),
    [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in LONG)],
    ids=lambda v: str(v).replace(" ", "+"),
)
def test_a_checkpoint_of_any_plan_goes_on_under_any_other(model: str, saved: str, loaded: str, ranks: Ranks, tmp_path: Path) -> None:
    before, after = (Setting(model, parallel=ParallelPlan(micro_batch=4, **PLANS[name])) for name in (saved, loaded))  # type: ignore[arg-type]
    straight = train(Setting(model, steps=2 * STEPS, parallel=ParallelPlan(micro_batch=4))).losses
    first = ranks(before.parallel.world_size).run(continue_elsewhere, before, tmp_path / "step-3", True, STEPS)[0]
    second = ranks(after.parallel.world_size).run(continue_elsewhere, after, tmp_path / "step-3", False, STEPS)[0]
    assert_allclose([*first, *second], straight, rtol=1e-6)
