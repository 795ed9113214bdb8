"""The plan that is proposed is one that runs, fits, and is predicted to be no slower than any other that does."""

import itertools

import pytest

from regrowth.parallel.cluster import clusters, load_cluster
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.planner import predict
from regrowth.parallel.search import best_plan
from regrowth.pretrain.model_config import ModelConfig

H100 = load_cluster(clusters()["h100_node"])
LLAMA_8B = ModelConfig(vocabulary=128_256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn_width=14_336, tied=False)
BATCH, LENGTH = 64, 8192


def test_no_plan_that_fits_is_faster() -> None:
    found = best_plan(LLAMA_8B, ParallelPlan(micro_batch=2), 16, H100, BATCH, LENGTH, 2)
    assert found is not None
    chosen, prediction = found
    assert chosen.world_size == 16 and prediction.fits and chosen.tp <= 8
    powers = (1, 2, 4, 8, 16)
    for pp, replicate, shard, cp, tp in itertools.product(powers, repeat=5):
        if pp * replicate * shard * cp * tp != 16 or tp > 8:
            continue
        plan = ParallelPlan(
            pp=pp, dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp, micro_batch=chosen.micro_batch, recompute=chosen.recompute
        )
        try:
            plan.check_batch(BATCH)
            plan.check_model(LLAMA_8B, LENGTH, BATCH)
        except ValueError:
            continue
        other = predict(LLAMA_8B, plan, H100, BATCH, LENGTH, 2)
        assert not other.fits or other.step_seconds >= prediction.step_seconds - 1e-9, plan


@pytest.mark.parametrize(("ranks", "there"), [(1, False), (8, True)])
def test_where_nothing_fits_there_is_none(ranks: int, there: bool) -> None:
    assert (best_plan(LLAMA_8B, ParallelPlan(), ranks, H100, BATCH, LENGTH, 2) is not None) is there


def test_a_plan_that_is_as_fast_as_any_stays() -> None:
    small = ModelConfig()
    found = best_plan(small, ParallelPlan(dp_replicate=1, micro_batch=4), 1, H100, 8, 64, 4)
    assert found is not None and found[0] == ParallelPlan(micro_batch=4)
