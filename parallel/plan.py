"""The parallel plan: how many ways each axis splits, what a micro-batch is, and what is kept or computed again.

A plan that cannot run is refused before any process starts, with every reason and the nearest plan of as many ranks that can.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field, model_validator

from regrowth.settings import Settings

Size = Annotated[int, Field(ge=1)]
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # slowest to fastest: tp's ranks are neighbours

# Stages that a rank holds under each schedule of torch.distributed.pipelining: the least and the most.
SCHEDULES: dict[str, tuple[int, int]] = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved_1f1b": (2, 64),
    "looped_bfs": (2, 64),
    "interleaved_zero_bubble": (2, 64),
    "zbv_zero_bubble": (2, 2),
    "dualpipev": (2, 2),
}
V_SCHEDULES = ("zbv_zero_bubble", "dualpipev")  # rank r holds stages r and 2 pp - 1 - r


class ModelDims(Protocol):
    """What a plan must divide."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def expert_count(self) -> int: ...
    @property
    def hidden_widths(self) -> dict[str, int]: ...


class ParallelPlan(Settings):
    """dp_replicate x dp_shard x cp x tp x pp ranks; experts (`ep`) share the ranks of dp_shard x cp."""

    dp_replicate: Size = 1  # replicas that all-reduce gradients
    dp_shard: Size = 1  # ranks that shard weights, gradients and moments (FSDP2)
    cp: Size = 1  # ranks that share a sequence
    tp: Size = 1  # ranks that share every matrix
    pp: Size = 1  # ranks that share the layers
    ep: Size = 1  # ranks that share the experts
    engine: Literal["native", "deepspeed"] = "native"  # what runs it: torch's own parallelism, or DeepSpeed's ZeRO-1 over the data ranks
    micro_batch: Size = 8  # sequences per forward/backward of one data-parallel rank
    sequence_parallel: bool = True  # with tp: activations between the split matrices are shared out along the sequence
    context: Literal["ring", "all_to_all"] = "ring"  # with cp: keys and values go round, or heads are exchanged for positions (Ulysses)
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev"] = "1f1b"
    stages_per_rank: Size | None = None  # with pp; None: the least that the schedule takes
    stage_layers: list[Annotated[int, Field(ge=0)]] | None = None  # layers of each stage; None: balanced by cost
    reshard_after_forward: bool | None = None  # with dp_shard: free gathered weights until the backward pass; None: unless under pp
    # With dp_shard: weights that a precision recipe rounds by one scale are sent as eight bits ("narrow"), or never ("wide"); "auto": where that is measured to be faster.
    gather: Literal["auto", "wide", "narrow"] = "auto"
    offload: bool = False  # with dp_shard: keep weights, gradients and moments in the host's memory
    recompute: Literal["none", "full", "selective"] = "none"  # activations, in the backward pass; selective keeps matrix products
    recompute_every: Size = 1  # of the layers, recompute every n-th
    compile: bool = False  # torch.compile each block

    @model_validator(mode="after")
    def _sound_in_itself(self) -> "ParallelPlan":
        least, most = SCHEDULES[self.schedule]
        if self.stages_per_rank is not None and self.pp > 1 and not least <= self.stages_per_rank <= most:
            raise ValueError(f'parallel.stages_per_rank = {self.stages_per_rank}: schedule "{self.schedule}" takes '
                             f"{least if least == most else f'{least} or more'}")  # fmt: skip
        if self.stage_layers is not None and len(self.stage_layers) != self.stages:
            raise ValueError(f"parallel.stage_layers names {len(self.stage_layers)} stages; the plan has pp = {self.pp} x "
                             f"{self.held_stages} = {self.stages}")  # fmt: skip
        return self

    @property
    def world_size(self) -> int:
        """Ranks the plan needs."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def held_stages(self) -> int:
        """Pipeline stages of one rank."""
        return (self.stages_per_rank or SCHEDULES[self.schedule][0]) if self.pp > 1 else 1

    @property
    def stages(self) -> int:
        """Pipeline stages in all."""
        return self.pp * self.held_stages

    @property
    def shards_weights(self) -> int:
        """Ranks over which FSDP2 shards weights: those of dp_shard and of cp."""
        return self.dp_shard * self.cp

    @property
    def reshards(self) -> bool:
        """Whether FSDP frees gathered weights after the forward pass; a pipeline's many micro-batches would gather them anew each time."""
        return self.pp == 1 if self.reshard_after_forward is None else self.reshard_after_forward

    def check_batch(self, global_batch: int) -> None:
        """A step's sequences must fall evenly on ranks.

        Raises:
            ValueError: naming the nearest batch that does.
        """
        unit = self.data_ranks * (self.micro_batch if self.pp > 1 else 1)
        if global_batch % unit:
            near = max(1, round(global_batch / unit)) * unit
            of = f"parallel.dp_replicate x dp_shard = {self.data_ranks} ranks"
            of += f" in micro-batches of {self.micro_batch} (a pipeline's are all alike)" if self.pp > 1 else ""
            raise ValueError(
                f"loader.global_batch = {global_batch} sequences cannot be shared evenly by {of}; the nearest batch that can is {near}"
            )

    def check_world(self, ranks: int) -> None:
        """The processes that were started must be as many as the plan needs.

        Raises:
            ValueError: with both numbers and the remedy.
        """
        if ranks != self.world_size:
            axes = " x ".join(f"{axis} = {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one rank"
            other = {**dict.fromkeys(AXES, 1), "dp_replicate": ranks}
            raise ValueError(
                f"the plan needs {self.world_size} processes ({axes}), {ranks} were started. Start {self.world_size}, or set "
                + " ".join(f"parallel.{axis}={size}" for axis, size in other.items() if getattr(self, axis) != size)
            )

    def with_fewer_replicas(self, ranks: int, model: ModelDims, sequence_length: int, global_batch: int) -> "ParallelPlan | None":
        """The plan with the most data-parallel ranks that runs on at most so many ranks, everything else as it is; None if there is none."""
        found: list[ParallelPlan] = []
        for replicate in range(1, self.dp_replicate + 1):
            for shard in range(1, self.dp_shard + 1):
                plan = self.model_copy(update={"dp_replicate": replicate, "dp_shard": shard})
                if plan.world_size > ranks or _reasons(plan, model, sequence_length, global_batch):
                    continue
                with suppress(ValueError):
                    plan.check_batch(global_batch)
                    found.append(plan)
        return max(found, key=lambda plan: (plan.data_ranks, plan.dp_shard), default=None)

    def check_model(self, model: ModelDims, sequence_length: int, global_batch: int) -> None:
        """The model and the batch must divide as the plan says.

        Raises:
            ValueError: every reason, and the nearest plan of as many ranks that can run.
        """
        reasons = _reasons(self, model, sequence_length, global_batch)
        if reasons:
            near = nearest_plan(self, lambda plan: not _reasons(plan, model, sequence_length, global_batch))
            raise ValueError("; ".join(reasons) + f". {near}")


def _reasons(plan: ParallelPlan, model: ModelDims, length: int, global_batch: int) -> list[str]:
    """Why a plan cannot run this model."""
    checks: list[tuple[bool, str]] = []

    def divides(size: int, by: int, what: str, axis: str) -> None:
        checks.append((size % by != 0, f"{what} = {size} is not divisible by {axis} = {by}"))

    if plan.engine == "deepspeed":
        asked = [f"parallel.{axis} = {getattr(plan, axis)}" for axis in ("cp", "tp", "pp", "ep") if getattr(plan, axis) > 1]
        asked += [f"parallel.{key} = true" for key in ("offload", "compile") if getattr(plan, key)]
        asked += [] if plan.reshard_after_forward is None else ["parallel.reshard_after_forward"]
        checks.append((bool(asked), f'{", ".join(asked)}: parallel.engine = "deepspeed" splits data only'))
    if plan.tp > 1:
        for what, size in {"model.heads": model.heads, "model.kv_heads": model.kv_heads, "model.vocabulary": model.vocabulary,
                           **model.hidden_widths}.items():  # fmt: skip
            divides(size, plan.tp, what, "parallel.tp")
    if plan.cp > 1:
        divides(length, 2 * plan.cp, "loader.sequence_length", "2 x parallel.cp")
        if plan.context == "all_to_all":
            divides(model.heads, plan.tp * plan.cp, "model.heads", "parallel.tp x cp")
            divides(model.kv_heads, plan.tp * plan.cp, "model.kv_heads", "parallel.tp x cp")
    if plan.tp > 1 and plan.sequence_parallel:
        divides(length, plan.cp * plan.tp, "loader.sequence_length", "parallel.cp x tp")
    if plan.pp > 1:
        checks.append((plan.stages > model.layers, f"{plan.stages} pipeline stages (parallel.pp = {plan.pp} x {plan.held_stages} a rank) "
                       f"are more than model.layers = {model.layers}"))  # fmt: skip
        if plan.stage_layers is not None:
            held = sum(plan.stage_layers)
            checks.append((held != model.layers, f"parallel.stage_layers sums to {held}, model.layers is {model.layers}"))
            checks.append((0 in plan.stage_layers[1:-1], "parallel.stage_layers: only the first and the last stage may be without layers"))
        in_two_parts = plan.schedule in ("interleaved_zero_bubble", *V_SCHEDULES)
        checks.append((in_two_parts and plan.recompute != "none", f'parallel.recompute = "{plan.recompute}": schedule "{plan.schedule}" runs '
                       "a backward pass in two parts, which recomputation cannot"))  # fmt: skip
        unit = plan.data_ranks * plan.micro_batch
        if global_batch % unit == 0:
            count = global_batch // unit
            rounds = max(1, count // plan.pp)
            if plan.schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
                checks.append((count % rounds != 0, f'schedule "{plan.schedule}" needs micro-batches ({count} of a step) in full rounds of '
                               f"parallel.pp = {plan.pp}"))  # fmt: skip
            least = {"1f1b": plan.pp, "dualpipev": plan.stages}.get(plan.schedule, 1)
            checks.append((count < least, f'schedule "{plan.schedule}" needs at least {least} micro-batches a step; there are {count}'))
        else:
            checks.append((True, f"loader.global_batch = {global_batch} is not a multiple of data ranks x parallel.micro_batch = {unit}"))
    elif global_batch % plan.data_ranks:
        checks.append((True, f"loader.global_batch = {global_batch} is not divisible by the {plan.data_ranks} data ranks"))
    if plan.offload and plan.engine == "native":
        sharded = plan.shards_weights > 1 and (plan.ep == 1 or plan.shards_weights > plan.ep)
        checks.append((not sharded, "parallel.offload keeps shards in the host's memory; with this plan weights or experts are not sharded "
                       "(dp_shard x cp > ep is needed)"))  # fmt: skip
    if plan.ep > 1:
        checks.append((model.expert_count == 0, f"parallel.ep = {plan.ep}: the model has no experts (model.moe)"))
        if model.expert_count:
            divides(model.expert_count, plan.ep, "model.moe.experts", "parallel.ep")
        divides(plan.dp_shard * plan.cp, plan.ep, "parallel.dp_shard x cp", "parallel.ep")
    return [reason for wrong, reason in checks if wrong]


@dataclass(frozen=True)
class _Candidate:
    plan: ParallelPlan
    distance: float


def nearest_plan(plan: ParallelPlan, runs: Callable[[ParallelPlan], bool]) -> str:
    """The nearest plan of as many ranks that `runs`, as overrides, or what to do where there is none."""
    best: _Candidate | None = None
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    for sizes in factorings(plan.world_size, len(AXES)):
        here = dict(zip(AXES, sizes, strict=True))
        shared = here["dp_shard"] * here["cp"]
        for ep in {d for d in (1, plan.ep, math.gcd(plan.ep, shared)) if shared % d == 0}:
            changes: dict[str, int] = {**here, "ep": ep}
            distance = sum(abs(math.log2(changes[name] / getattr(plan, name))) for name in names)
            values = {**plan.model_dump(), **changes}
            if changes["pp"] * plan.held_stages != plan.stages:
                values["stage_layers"] = None
            if best is None or distance < best.distance:
                try:
                    candidate = ParallelPlan.model_validate(values)
                except ValueError:
                    continue
                if runs(candidate):
                    best = _Candidate(candidate, distance)
    if best is None:
        return f"No plan of {plan.world_size} ranks can run this model at this batch and sequence length; change loader.global_batch or the number of ranks"
    changed = [f"parallel.{name}={getattr(best.plan, name)}" for name in names if getattr(best.plan, name) != getattr(plan, name)]
    return f"The nearest plan of {plan.world_size} ranks that can run: {' '.join(changed)}"


def factorings(number: int, parts: int) -> itertools.chain[tuple[int, ...]]:
    """All ordered ways to write a number as a product."""
    if parts == 1:
        return itertools.chain([(number,)])
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return itertools.chain.from_iterable(((d, *rest) for rest in factorings(number // d, parts - 1)) for d in divisors)
