"""A plan that cannot run is refused before anything starts, with the reason and the nearest one that can."""

import pytest
from pydantic import ValidationError

from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.planner import clusters, load_cluster, predict
from regrowth.pretrain.model_config import ModelConfig


@pytest.mark.parametrize("axis", ["cp", "tp", "pp", "ep"])
def test_axes_that_are_not_built_are_refused_by_name(axis: str) -> None:
    with pytest.raises(ValidationError, match=f"parallel.{axis} = 2: this version splits data only"):
        ParallelPlan.model_validate({axis: 2})


def test_a_batch_or_a_world_that_does_not_divide_is_refused_with_the_nearest() -> None:
    plan = ParallelPlan(dp_replicate=2, dp_shard=3)
    assert plan.world_size == plan.data_ranks == 6
    plan.check_batch(12)
    with pytest.raises(ValueError, match=r"global_batch = 16 .* = 6 ranks; the nearest batch that can is 18"):
        plan.check_batch(16)
    with pytest.raises(ValueError, match=r"needs 6 processes .*4 were started"):
        plan.check_world(4)


def test_predictions_follow_the_plan() -> None:
    model = ModelConfig(width=1024, layers=24, heads=16, kv_heads=16, head_dim=64, ffn_width=2816, vocabulary=32000)
    cluster = load_cluster(clusters()["h100_node"])

    def of(**plan: int | bool):  # type: ignore[no-untyped-def]
        return predict(model, ParallelPlan(**plan), cluster, global_batch=64, sequence_length=2048, bytes_per_value=2)  # type: ignore[arg-type]

    one, eight = of(), of(dp_shard=8)
    assert one.state_bytes == 16 * model.parameters and one.communication_seconds == 0
    assert eight.state_bytes < one.state_bytes / 4
    assert eight.compute_seconds == pytest.approx(one.compute_seconds / 8)
    assert of(recompute=True).activation_bytes < one.activation_bytes
    assert of(recompute=True).compute_seconds == pytest.approx(one.compute_seconds * 4 / 3)
    assert not of(micro_batch=64).fits and eight.fits
