"""The bubble of pipeline schedules in simulated time: stages whose forward and backward passes sleep, in real processes with real messages.

Sleeping costs no core, so that as many stages as processes run beside each other on any machine. Ideal: micro-batches times the time of all
of a rank's stages. The published bubble of 1F1B is (p - 1) / (m v) of it: p ranks, m micro-batches, v stages a rank; zero-bubble schedules stay below.

    python benchmarks/pipeline_bubble.py --quick
"""

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from regrowth.parallel.pipeline import build_schedule, stages_of_rank
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.ranks import RankPool


class _SleepInput(torch.autograd.Function):
    """The forward product, and the input gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0].clone(), None


class _SleepWeight(torch.autograd.Function):
    """Nothing forward, the weight gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, like: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grads[0].sum()[None], None, None


class Stage(nn.Module):
    """Takes `seconds` forward, and as long for each of the two gradients, which zero-bubble schedules ask for apart."""

    def __init__(self, seconds: float, last: bool) -> None:
        super().__init__()
        self.seconds, self.last = seconds, last
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Any:
        out: Any = _SleepInput.apply(x.float(), self.seconds)
        out = out + _SleepWeight.apply(self.weight, out.detach(), self.seconds)
        return (out.sum()[None], out.detach()) if self.last else out


def measure(plan: ParallelPlan, micro_batches: int, seconds: float) -> float:
    """Seconds of a step, the least of two after one for warming up."""
    torch.set_num_threads(1)
    stage_seconds = seconds / plan.held_stages
    modules: dict[int, nn.Module] = {s: Stage(stage_seconds, s == plan.stages - 1) for s in stages_of_rank(plan, dist.get_rank())}

    def examples(number: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        x = torch.empty(1, 8, device="meta", requires_grad=True)
        given = torch.empty(1, 8, device="meta") if number == 0 else x
        return (given,), (
            torch.empty(1, device="meta", requires_grad=True),
            torch.empty(1, 8, device="meta"),
        ) if number == plan.stages - 1 else (x,)

    group = dist.group.WORLD
    assert group is not None
    schedule = build_schedule(plan, modules, examples, micro_batches, lambda out, target: out[0].sum(), torch.device("cpu"), group)
    x, taken = torch.ones(micro_batches, 8), []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        schedule.step(*([x] if 0 in modules else []), target=torch.zeros(micro_batches))
        dist.barrier()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 seconds")
    arguments = parser.parse_args()
    pp, micro_batches, seconds = 4, 8, 0.02 if arguments.quick else 0.1
    table = Table(
        "schedule",
        "stages a rank",
        "bubble",
        "(p-1)/(m v)",
        "points apart",
        title=f"{pp} ranks, {micro_batches} micro-batches, simulated time",
    )
    pool = RankPool(pp)
    try:
        for name, held in (
            ("gpipe", 1),
            ("1f1b", 1),
            ("interleaved_1f1b", 2),
            ("looped_bfs", 2),
            ("interleaved_zero_bubble", 2),
            ("zbv_zero_bubble", 2),
            ("dualpipev", 2),
        ):
            plan = ParallelPlan(pp=pp, schedule=name, stages_per_rank=held, micro_batch=1)  # pyright: ignore[reportArgumentType]
            ideal = micro_batches * 3 * seconds
            bubble = max(pool.run(measure, plan, micro_batches, seconds)) / ideal - 1
            published = (pp - 1) / (micro_batches * held)
            table.add_row(name, str(held), f"{bubble:.1%}", f"{published:.1%}", f"{100 * (bubble - published):+.1f}")
    finally:
        pool.close()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
