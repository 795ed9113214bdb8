"""Pipeline parallelism: which layers a stage holds, and the schedule that runs its micro-batches (torch.distributed.pipelining).

A stage's modules carry the whole model's names. Stages are balanced by cost: the head counts for what it costs, the embedding for nothing
but memory, layers by their FLOPs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from regrowth.parallel.plan import V_SCHEDULES, ParallelPlan

SCHEDULE_CLASSES: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "looped_bfs": schedules.ScheduleLoopedBFS,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


class Costs(Protocol):
    """What balancing needs of a model."""

    @property
    def layers(self) -> int: ...

    def layer_flops_per_token(self, layer: int, sequence_length: int) -> int: ...

    @property
    def head_flops_per_token(self) -> int: ...


def stages_of_rank(plan: ParallelPlan, rank: int) -> list[int]:
    """The stages that a rank of `pp` holds: every pp-th one, or the two ends of a V."""
    if plan.schedule in V_SCHEDULES and plan.pp > 1:
        return [rank, plan.stages - 1 - rank]
    return [rank + turn * plan.pp for turn in range(plan.held_stages)]


def balanced(costs: Sequence[float], last: float, stages: int) -> list[int]:
    """How many layers each stage takes so that the costliest stage is as cheap as can be, and among such splits the most even.

    Args:
        costs: of each layer, in order.
        last: what the last stage bears besides its layers (the head).
    """
    count = len(costs)
    ends = [0.0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    # best[n] after s stages: (the costliest stage, the sum of squares) of the first n layers in s stages, and the way there.
    best: list[tuple[float, float, tuple[int, ...]] | None] = [(0.0, 0.0, ())] + [None] * count
    for stage in range(stages):
        extra = last if stage == stages - 1 else 0.0
        reached: list[tuple[float, float, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(stage + 1, count - (stages - 1 - stage) + 1):
            for begin in range(stage, end):
                if (before := best[begin]) is None:
                    continue
                cost = ends[end] - ends[begin] + extra
                candidate = (max(before[0], cost), before[1] + cost * cost, (*before[2], end - begin))
                if (known := reached[end]) is None or candidate < known:
                    reached[end] = candidate
        best = reached
    found = best[count]
    assert found is not None, "more stages than layers"
    return list(found[2])


def layers_of_stages(plan: ParallelPlan, model: Costs, sequence_length: int) -> list[range]:
    """The layers of each stage."""
    counts = plan.stage_layers
    if counts is None:
        costs = [float(model.layer_flops_per_token(i, sequence_length)) for i in range(model.layers)]
        counts = balanced(costs, float(model.head_flops_per_token), plan.stages)
    if sum(counts) != model.layers:
        raise ValueError(f"parallel.stage_layers sums to {sum(counts)}, the model has {model.layers} layers")
    begins = [sum(counts[:stage]) for stage in range(plan.stages)]
    return [range(begin, begin + count) for begin, count in zip(begins, counts, strict=True)]


def build_schedule(
    plan: ParallelPlan,
    modules: dict[int, nn.Module],
    examples: Callable[[int], tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]],
    micro_batches: int,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    device: torch.device,
    group: dist.ProcessGroup,
) -> Any:
    """The schedule over this rank's stages.

    Args:
        modules: stage number -> module.
        examples: stage number -> (inputs, outputs) of one micro-batch on the meta device, so that nothing is run to find shapes out.
        loss: (the last stage's output, target) -> what to differentiate.
    """
    stages = []
    for number, module in sorted(modules.items()):
        inputs, outputs = examples(number)
        stages.append(PipelineStage(module, number, plan.stages, device, input_args=inputs, output_args=outputs, group=group))
    kind = SCHEDULE_CLASSES[plan.schedule]
    held = stages[0] if plan.held_stages == 1 else stages
    return kind(held, micro_batches, loss_fn=loss, scale_grads=False)


def forward_only(
    plan: ParallelPlan,
    modules: dict[int, nn.Module],
    micro_batches: Sequence[dict[str, torch.Tensor]],
    hidden: tuple[int, ...],
    dtype: torch.dtype,
    inputs: Sequence[str],
    group: dist.ProcessGroup,
) -> torch.Tensor | None:
    """nll [b, t] of all micro-batches on the rank with the last stage, None elsewhere. Stage by stage, each sending on what it has done.

    Args:
        hidden: the shape of one sequence between stages.
        dtype: of it.
        inputs: the keys of a micro-batch that every stage takes besides its input.
    """
    owner = {stage: rank for rank in range(plan.pp) for stage in stages_of_rank(plan, rank)}
    kept: list[torch.Tensor] = []  # what a stage of this rank hands to the next one of this rank
    sent, losses = [], []
    for stage, module in sorted(modules.items()):
        taken, kept = kept, []
        for number, part in enumerate(micro_batches):
            if stage == 0:
                x = part["tokens"]
            elif owner[stage - 1] == owner[stage]:
                x = taken[number]
            else:
                x = torch.empty(len(part["tokens"]), *hidden, dtype=dtype, device=part["tokens"].device)
                dist.recv(x, src=dist.get_global_rank(group, owner[stage - 1]), group=group)
            out = module(x, *(part[name] for name in inputs))
            if stage == plan.stages - 1:
                losses.append(out[1])
            elif owner[stage + 1] == owner[stage]:
                kept.append(out)
            else:
                out = out.contiguous()
                sent.append((dist.isend(out, dst=dist.get_global_rank(group, owner[stage + 1]), group=group), out))
    for work, _ in sent:
        work.wait()
    return torch.cat(losses) if losses else None
