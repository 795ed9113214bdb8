"""Among all ways to split a model over a number of ranks, the one that the planner predicts to be fastest and that fits."""

from typing import Protocol

from regrowth.kernels.recipe import FULL, PrecisionRecipe
from regrowth.parallel.cluster import Cluster
from regrowth.parallel.plan import AXES, ModelDims, ParallelPlan, factorings
from regrowth.parallel.planner import ModelSize, Prediction, predict


class Model(ModelDims, ModelSize, Protocol):
    """What must divide, and what is counted."""


def best_plan(
    model: Model,
    like: ParallelPlan,
    ranks: int,
    cluster: Cluster,
    global_batch: int,
    sequence_length: int,
    bytes_per_value: int,
    recipe: PrecisionRecipe = FULL,
) -> tuple[ParallelPlan, Prediction] | None:
    """The fastest plan that fits the memory, or None; of equals the one nearest to `like`, whose other settings are kept.

    Tensor parallelism is only tried within a node. Micro-batches are those of `like` and its halves, recomputation is tried as it is and
    as more.
    """
    best: tuple[tuple[float, int], ParallelPlan, Prediction] | None = None
    for sizes in factorings(ranks, len(AXES)):
        axes = dict(zip(AXES, sizes, strict=True))
        if axes["tp"] > cluster.devices_per_node:
            continue
        for recompute in dict.fromkeys((like.recompute, "selective", "full")):
            micro = like.micro_batch
            while micro >= 1:
                values = {**like.model_dump(), **axes, "micro_batch": micro, "recompute": recompute, "stage_layers": None}
                if axes["dp_shard"] * axes["cp"] % values["ep"]:
                    values["ep"] = 1
                plan = ParallelPlan.model_validate(values)
                try:
                    plan.check_batch(global_batch)
                    plan.check_model(model, sequence_length, global_batch)
                except ValueError:
                    micro //= 2
                    continue
                prediction = predict(model, plan, cluster, global_batch, sequence_length, bytes_per_value, recipe)
                far = sum(getattr(plan, key) != getattr(like, key) for key in (*AXES, "micro_batch", "recompute"))
                if prediction.fits and (best is None or (round(prediction.step_seconds, 9), far) < best[0]):
                    best = (round(prediction.step_seconds, 9), far), plan, prediction
                micro //= 2
    return (best[1], best[2]) if best else None
