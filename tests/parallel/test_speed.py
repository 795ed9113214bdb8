"""Predictions reckon with a precision recipe where a machine's description says how much faster narrow formats are, and nowhere else."""

from pathlib import Path

import pytest

from regrowth.errors import UserError
from regrowth.kernels.cost import SPEED, flop_shares, recipe_times
from regrowth.kernels.recipe import FULL
from regrowth.parallel.cluster import Cluster, clusters, load_cluster
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.planner import Prediction, predict
from regrowth.parallel.search import best_plan
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.precision import load_recipe
from tests.launch.helpers import call

MODEL = ModelConfig(vocabulary=32_000, width=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn_width=5504, tied=False)
FP4 = load_recipe("fp4_paper")
H100 = clusters()["h100_node"]


def described(folder: Path, lines: str) -> Path:
    path = folder / "machine.toml"
    path.write_text(H100.read_text().replace("[slurm]", f"[speed]\n{lines}\n\n[slurm]"))
    return path


def of(cluster: Cluster, recipe=FULL, **plan: object) -> Prediction:  # type: ignore[no-untyped-def]
    return predict(MODEL, ParallelPlan.model_validate(plan), cluster, 64, 2048, 2, recipe)


def test_a_recipe_is_faster_only_where_the_machine_says_so(tmp_path: Path) -> None:
    plain, fast = load_cluster(H100), load_cluster(described(tmp_path, "e2m1 = 4.0\ne4m3 = 2\ne5m2 = 2.0"))
    assert plain.speed is None and of(plain, FP4) == of(plain) == of(fast)
    times = recipe_times(FP4, flop_shares(MODEL, 2048), SPEED, MODEL.layers)
    assert of(fast, FP4).compute_seconds == pytest.approx(times.step * of(plain).compute_seconds)
    assert of(fast, FP4, dp_shard=8).communication_seconds == of(plain, dp_shard=8).communication_seconds
    # Recomputation is one more forward pass, which has its own speed.
    again = of(fast, FP4, recompute="full").compute_seconds
    assert again == pytest.approx((times.step + times.forward / 3) * of(plain).compute_seconds)
    found = best_plan(MODEL, ParallelPlan(), 8, fast, 64, 2048, 2, FP4)
    assert found is not None and found[1] == predict(MODEL, found[0], fast, 64, 2048, 2, FP4)


@pytest.mark.parametrize(
    ("lines", "told"),
    [("e4m4 = 2.0", 'unknown key "speed.e4m4"'), ("e4m3 = 0", "speed.e4m3 = 0"), ("e4m3 = -1.5", "speed.e4m3 = -1.5"), ("e2m1 = inf", "speed.e2m1 = inf"),
     ('e2m1 = "fast"', "speed.e2m1 = 'fast'")],
)  # fmt: skip
def test_speeds_that_are_none_are_refused(tmp_path: Path, lines: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_cluster(described(tmp_path, lines))


def test_what_is_assumed_is_told_where_something_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(cluster: str, recipe: str) -> str:
        code, told = call(capsys, monkeypatch, "plan", "quickstart", "--cluster", cluster, f"precision.recipe={recipe}")
        assert code == 0, told
        return told

    assert "[speed]" not in plan("h100_node", "fp8_rowwise")
    with_speed = plan(str(described(tmp_path, "e4m3 = 2.0")), "fp8_rowwise")
    (line,) = [line for line in with_speed.splitlines() if "[speed]" in line]
    assert "under fp8_rowwise" in line and "e4m3 2 x" in line and " 1.00 x as fast" not in line
    assert "under full are taken to be 1.00 x as fast" in plan(str(tmp_path / "machine.toml"), "full")
