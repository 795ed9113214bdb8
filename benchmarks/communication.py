"""Bytes that a rank sends in a training step under each plan, counted at the collectives, beside what the plan cannot do without.

The lower bound counts, with p parameters and ring algorithms over n ranks: all-reducing gradients 2 (n-1)/n p; FSDP two gathers and one scatter of
(n-1)/n p; tensor parallelism eight exchanges of a layer's activations and two each around embedding and head; the ring's keys and values n-1 times
round forward, n-1 times backward, and their gradients home; a pipeline's activations and their gradients; experts' rows there and back,
forward and backward. What is measured above it: norms, losses, masks, gradients computed in parts, padding.

    python benchmarks/communication.py --quick
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from regrowth.parallel.mesh import Mesh
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.ranks import RankPool
from regrowth.pretrain.build import build_engine
from regrowth.pretrain.conformance import MODELS as CONFORMANCE_MODELS
from regrowth.pretrain.conformance import Setting, Shape, made_up_batch, run_step
from regrowth.pretrain.model_config import ModelConfig, MoEConfig

MODELS = {
    "dense": ModelConfig(vocabulary=512, width=128, layers=4, heads=4, kv_heads=4, head_dim=32, ffn_width=384, tied=False),
    "moe": ModelConfig(
        vocabulary=512, width=128, layers=4, heads=4, kv_heads=4, head_dim=32, ffn_width=384, tied=False, moe=MoEConfig(expert_width=192)
    ),
}
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"dp_replicate": 2}),
    ("dense", {"dp_shard": 2}),
    ("dense", {"dp_shard": 4}),
    ("dense", {"tp": 2}),
    ("dense", {"tp": 4}),
    ("dense", {"cp": 2}),
    ("dense", {"cp": 4}),
    ("dense", {"cp": 2, "context": "all_to_all"}),
    ("dense", {"pp": 2}),
    ("dense", {"dp_shard": 2, "tp": 2}),
    ("moe", {"dp_shard": 4, "ep": 4}),
]


class Counter(TorchDispatchMode):
    """Adds up what this rank sends, by the algorithm's share of the payload."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        size = dist.ProcessGroup.unbox(group).size() if group is not None else 2
        tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]
        payload = float(max((t.numel() * t.element_size() for t in tensors), default=0))
        share = {"allreduce_": 2 * (size - 1) / size, "send": 1.0, "recv_": 0.0, "barrier": 0.0, "broadcast_": 1.0}.get(
            name, (size - 1) / size
        )
        self.sent[name] = self.sent.get(name, 0.0) + payload * share


def measure(model: str, plan: ParallelPlan, shape: Shape) -> dict[str, float]:
    """Bytes sent by this rank in a step, by operation; the second step's, when everything has been set up."""
    CONFORMANCE_MODELS["benchmark"] = MODELS[model]
    setting = Setting("benchmark", parallel=plan, loader=shape)
    engine = build_engine(setting, MODELS[model], Mesh(plan, torch.device("cpu")))
    for step in range(2):
        with Counter() as counter:
            run_step(engine, made_up_batch(step, MODELS[model].vocabulary, shape), torch.device("cpu"))
            engine.step(1e-3, 1.0)
    return counter.sent


def bound(model: ModelConfig, plan: ParallelPlan, shape: Shape) -> float:
    """What one rank must send in a step at least, in bytes of fp32."""
    tokens = shape.global_batch * shape.sequence_length / plan.data_ranks / plan.cp
    hidden, layers = 4.0 * tokens * model.width, model.layers / plan.pp
    shared, total = 4.0 * model.parameters / plan.tp / plan.pp, 0.0
    if model.moe:
        held = layers * 3 * model.moe.experts * model.moe.expert_width * model.width * 4.0
        shared -= held if plan.ep > 1 else 0.0
        total += 4 * hidden * model.moe.top_k * layers * (plan.ep - 1) / plan.ep
    n, r = plan.shards_weights, plan.dp_replicate
    micro_steps = shape.global_batch // plan.data_ranks // plan.micro_batch
    gathers = 1 if plan.pp > 1 else 2 * micro_steps
    kept = 4.0 * (2 * model.vocabulary * model.width + model.width) / plan.tp  # embedding, head and last norm are gathered once
    total += (n - 1) / n * (shared * (gathers + 1) - kept * (gathers - gathers / 2)) if n > 1 else 0.0
    total += 2 * shared / n * (r - 1) / r
    total += (plan.tp - 1) / plan.tp * hidden * (8 * layers + 4)
    if plan.cp > 1 and plan.context == "ring":
        total += layers * (plan.cp - 1) * 4.0 * tokens * 2 * model.kv_width * 3
    elif plan.cp > 1:
        total += layers * 2 * (plan.cp - 1) / plan.cp * 4.0 * tokens * 2 * (model.heads + model.kv_heads) * model.head_dim
    if plan.pp > 1:
        total += hidden  # an end stage sends its activations, or their gradients
    return total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 seconds")
    arguments = parser.parse_args()
    shape = Shape(64, 8) if arguments.quick else Shape(256, 8)
    table = Table(
        "model",
        "plan",
        "sent by a rank",
        "at least",
        "ratio",
        "most of it",
        title=f"bytes a step, {shape.global_batch} x {shape.sequence_length} tokens, fp32",
    )
    pools: dict[int, RankPool] = {}
    try:
        for model, options in PLANS:
            plan = ParallelPlan(**{"micro_batch": 4 if options.get("pp") else 8, **options})
            plan = plan.model_copy(update={"micro_batch": min(plan.micro_batch, shape.global_batch // plan.data_ranks)})
            pool = pools.setdefault(plan.world_size, RankPool(plan.world_size))
            sent = max(pool.run(measure, model, plan, shape), key=lambda counts: sum(counts.values()))
            total, least = sum(sent.values()), bound(MODELS[model], plan, shape)
            most = ", ".join(f"{name} {share / total:.0%}" for name, share in sorted(sent.items(), key=lambda item: -item[1])[:2])
            told = " ".join(f"{key}={value}" for key, value in options.items())
            table.add_row(model, told, f"{total / 2**20:.2f} MiB", f"{least / 2**20:.2f} MiB", f"{total / least:.2f}", most)
    finally:
        for pool in pools.values():
            pool.close()
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
