"""A plan that cannot run is refused before anything starts, with the reason and the nearest one that can."""

import itertools

import pytest
from pydantic import ValidationError

from regrowth.parallel.cluster import clusters, load_cluster
from regrowth.parallel.pipeline import balanced, stages_of_rank
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.planner import predict
from regrowth.pretrain.model_config import ModelConfig, MoEConfig

MODEL = ModelConfig(vocabulary=1024, width=64, layers=6, heads=6, kv_heads=2, head_dim=16, ffn_width=128)
MIXTURE = MODEL.model_copy(update={"moe": MoEConfig(experts=6)})


@pytest.mark.parametrize(
    ("plan", "model", "told"),
    [
        ({"tp": 4}, MODEL, r"model.heads = 6 is not divisible by parallel.tp = 4; model.kv_heads = 2 .*nearest plan of 4 ranks that can run: parallel.\w+=2 parallel.tp=2"),
        ({"cp": 3}, MODEL, r"loader.sequence_length = 64 is not divisible by 2 x parallel.cp = 6"),
        ({"tp": 2, "cp": 2, "context": "all_to_all"}, MODEL, r"model.heads = 6 is not divisible by parallel.tp x cp = 4"),
        ({"pp": 8, "micro_batch": 1}, MODEL, r"8 pipeline stages \(parallel.pp = 8 x 1 a rank\) are more than model.layers = 6"),
        ({"pp": 2, "micro_batch": 16}, MODEL, r'schedule "1f1b" needs at least 2 micro-batches a step; there are 1'),
        ({"pp": 2, "micro_batch": 5}, MODEL, r"loader.global_batch = 16 is not a multiple of data ranks x parallel.micro_batch = 5"),
        ({"pp": 2, "micro_batch": 4, "stage_layers": [3, 4]}, MODEL, r"stage_layers sums to 7, model.layers is 6"),
        ({"dp_shard": 2, "ep": 2}, MODEL, r"parallel.ep = 2: the model has no experts \(model.moe\). The nearest plan .*parallel.ep=1"),
        ({"dp_shard": 4, "ep": 4}, MIXTURE, r"model.moe.experts = 6 is not divisible by parallel.ep = 4. The nearest .* parallel.ep=\d"),
        ({"dp_replicate": 2, "ep": 2}, MIXTURE, r"parallel.dp_shard x cp = 1 is not divisible by parallel.ep = 2"),
        ({"dp_replicate": 3}, MODEL, r"global_batch = 16 is not divisible by the 3 data ranks. The nearest plan of 3"),
        ({"dp_replicate": 7}, MODEL, r"No plan of 7 ranks can run this model"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_run_is_refused_with_every_reason_and_the_nearest_that_can(plan: dict, model: ModelConfig, told: str) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        ParallelPlan(**{"micro_batch": 1, **plan}).check_model(model, 64, 16)
    if "that can run: " in str(refused.value):
        changes = {
            k.removeprefix("parallel."): int(v)
            for k, v in (item.split("=") for item in str(refused.value).split("that can run: ")[1].split())
        }
        ParallelPlan.model_validate({"micro_batch": 1, **plan, **changes, "stage_layers": None}).check_model(model, 64, 16)


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValidationError, match=r'stages_per_rank = 3: schedule "dualpipev" takes 2'):
        ParallelPlan(pp=2, schedule="dualpipev", stages_per_rank=3)
    with pytest.raises(ValidationError, match="stage_layers names 3 stages; the plan has pp = 2 x 1 = 2"):
        ParallelPlan(pp=2, stage_layers=[1, 2, 3])


def test_stages_are_balanced_by_cost_and_the_head_counts() -> None:
    assert balanced([1.0] * 8, 0.0, 4) == [2, 2, 2, 2]
    assert balanced([1.0] * 8, 2.0, 2) == [5, 3], "the head is worth two layers"
    assert balanced([1.0, 1.0, 4.0, 1.0, 1.0], 0.0, 3) == [2, 1, 2]
    assert balanced([1.0] * 4, 50.0, 4) == [1, 1, 1, 1], "no stage is left without a layer"
    for costs, last, stages in (([3.0, 1.0, 2.0, 5.0, 1.0, 1.0], 2.0, 3), ([1.0, 2.0, 3.0, 4.0, 5.0], 1.0, 2)):
        worst = min(max(sum(costs[a:b]) + (last if b == len(costs) else 0) for a, b in itertools.pairwise((0, *cuts, len(costs))))
                    for cuts in itertools.combinations(range(1, len(costs)), stages - 1))  # fmt: skip
        counts = balanced(costs, last, stages)
        begins = [sum(counts[:i]) for i in range(stages + 1)]
        assert max(sum(costs[a:b]) + (last if b == len(costs) else 0) for a, b in itertools.pairwise(begins)) == worst
    assert stages_of_rank(ParallelPlan(pp=4, schedule="zbv_zero_bubble"), 1) == [1, 6]
    assert stages_of_rank(ParallelPlan(pp=4, schedule="interleaved_1f1b", stages_per_rank=3), 1) == [1, 5, 9]


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

    def of(**plan: int | str):  # type: ignore[no-untyped-def]
        return predict(model, ParallelPlan(**plan), cluster, global_batch=64, sequence_length=2048, bytes_per_value=2)  # type: ignore[arg-type]

    one, eight = of(), of(dp_shard=8)
    assert one.state_bytes == 16 * model.parameters and one.communication_seconds == 0
    assert eight.state_bytes < one.state_bytes / 4
    assert eight.compute_seconds == pytest.approx(one.compute_seconds / 8)
    assert of(recompute="full").activation_bytes < one.activation_bytes
    assert of(recompute="full").compute_seconds == pytest.approx(one.compute_seconds * 4 / 3)
    assert not of(micro_batch=64).fits and eight.fits


def test_plans_that_would_fail_later_are_refused() -> None:
    for plan, told in (
        ({"pp": 3, "stage_layers": [3, 0, 3]}, "only the first and the last stage may be without layers"),
        ({"pp": 2, "schedule": "zbv_zero_bubble", "recompute": "full"}, "which recomputation cannot"),
        ({"dp_replicate": 2, "offload": True}, "offload keeps shards in the host's memory"),
        ({"tp": 4, "stages_per_rank": 3}, "nearest plan of 4 ranks"),
    ):
        with pytest.raises(ValueError, match=told):
            ParallelPlan(**{"micro_batch": 1, **plan}).check_model(MODEL, 64, 16)  # pyright: ignore[reportArgumentType]
