"""torch's own parallelism behind the engine edge: one plan of data, tensor, context, expert and pipeline parallelism, composed.

Things are applied in the order in which the constructor reads: what the model runs on (`use`), slicing, compilation, FSDP, storage, initial
values, optimizer, pipeline.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from regrowth.parallel.collectives import all_gather
from regrowth.parallel.context_parallel import AllToAllAttention, Core, RingAttention, take_part
from regrowth.parallel.data_parallel import gradient_sync, replicate, shard
from regrowth.parallel.dtensor import local_tensor
from regrowth.parallel.engine import INPUTS, MicroBatch, ModelDescription, Report, state_bytes
from regrowth.parallel.layout import Layouts
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.model_parallel import AuxiliaryLosses, ContextParallel, ModelParallel
from regrowth.parallel.narrow_gather import NarrowGather
from regrowth.parallel.pipeline import build_schedule, forward_only, layers_of_stages, stages_of_rank
from regrowth.parallel.tensor_parallel import TensorParallel


class NativeEngine:
    """One plan of data, tensor, context, expert and pipeline parallelism.

    Args:
        build: (layers, first, last) -> that part of the model, on the meta device, its parameters named canonically.
        core: the attention core of one process.
        fill: initialises canonical weights in place.
        optimizer: builds the optimizer from (name, parameter) pairs; its state's tensors are the moments.
        sequence_length: of every sequence.
        micro_batches: of a step on this rank, which a pipeline needs to know beforehand.
    """

    def __init__(
        self,
        build: Callable[[range | None, bool, bool], nn.Module],
        description: ModelDescription,
        mesh: Mesh,
        core: Core,
        fill: Callable[[dict[str, torch.Tensor]], None],
        optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        sequence_length: int,
        micro_batches: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        plan = mesh.plan
        self.plan, self.mesh, self.device, self.autocast = plan, mesh, mesh.device, autocast
        self.stream_dtype = autocast or torch.float32  # of what goes from stage to stage
        self.data_ranks, self.data_rank = plan.data_ranks, mesh.data_rank
        self.forward_rows = plan.micro_batch * (micro_batches if plan.pp > 1 else 1)
        tp = TensorParallel(mesh.group("tp"), sequence=plan.sequence_parallel and plan.tp > 1)
        self.auxiliary = AuxiliaryLosses(copies=plan.tp)
        context = mesh.group("cp")
        attend: Any = core
        if context is not None:
            attend = RingAttention(context) if plan.context == "ring" else AllToAllAttention(core, context)
        self.parallel = ModelParallel(tp, ContextParallel(context), mesh.group("ep"), mesh.group("sequence"), self.auxiliary)
        self.stages: dict[int, nn.Module] = {}
        # Names repeat only where tied weights lie on two stages of one rank.
        self.named: list[tuple[str, nn.Parameter]] = []
        self.mirrors: list[tuple[nn.Parameter, nn.Parameter]] = []
        held = stages_of_rank(plan, mesh.place["pp"])
        ranges = layers_of_stages(plan, description, sequence_length) if plan.pp > 1 else [None]
        self.layouts: Layouts | None = None
        for number in held:
            self._add_stage(number, build(ranges[number], number == 0, number == plan.stages - 1), attend)
        self.wrapped = plan.dp_replicate > 1 and plan.shards_weights * plan.tp * plan.pp * plan.ep == 1
        fill(self.weights())
        self.run: nn.Module | None = replicate(self.stages[0], mesh) if self.wrapped else self.stages.get(0) if plan.pp == 1 else None
        self._collect(description.tied and plan.pp > 1)
        self._mirror()
        sharded = plan.gather != "wide" and mesh.size("fsdp") > 1
        self.narrow = NarrowGather(self.modules, mesh, plan.gather) if sharded else None
        # The optimizer works on what this rank holds, as plain tensors: shards of different meshes then stand in one group, and a small step
        # does not pay for DTensor's dispatch.
        self.held = {name: nn.Parameter(_local(p), requires_grad=p.requires_grad) for name, p in self.named}
        self.optimizer = optimizer(list(self.held.items()))
        self.schedule: Any = None
        if plan.pp > 1:
            group = mesh.group("pp")
            assert group is not None
            self.hidden = (sequence_length // plan.cp // (plan.tp if tp.sequence else 1), description.width)
            examples = partial(self._examples, hidden=(plan.micro_batch, *self.hidden), length=sequence_length // plan.cp)
            self.schedule = build_schedule(plan, self.stages, examples, micro_batches, self._pipeline_loss, self.device, group)

    def _add_stage(self, number: int, module: nn.Module, attend: Any) -> None:
        model: Any = module
        model.use(self.parallel, attend)
        layouts = Layouts(self.mesh, model.parameter_split) if self.layouts is None else self.layouts
        self.layouts = layouts
        layouts.slice_parameters(module)
        if self.plan.compile:
            for block in model.blocks():
                block.compile()
        if self.plan.shards_weights > 1 or (self.plan.dp_replicate > 1 and self.plan.world_size > self.plan.dp_replicate):
            shard(module, model.blocks(), model.expert_modules(), self.mesh, self.autocast)
        # Offloaded shards stay on the CPU; what is gathered of them comes to the device.
        module.to_empty(device="cpu" if self.plan.offload else self.device)
        if self.plan.offload:
            for buffers in module.modules():
                for key, buffer in buffers.named_buffers(recurse=False):
                    setattr(buffers, key, buffer.to(self.device))
        if self.autocast and self.plan.pp > 1:  # a schedule runs forward and backward passes; only the first are in autocast
            model.forward = torch.autocast(self.device.type, dtype=self.autocast)(model.forward)
        self.stages[number] = module

    def _collect(self, tied: bool) -> None:
        """The parameters that are trained here; of tied weights on two stages of this rank, one is."""
        seen: dict[str, nn.Parameter] = {}
        for _, module in sorted(self.stages.items()):
            for name, parameter in module.named_parameters():
                if name in seen:
                    self.mirrors.append((seen[name], parameter))
                else:
                    seen[name] = parameter
        self.named = list(seen.items())
        self.tied_across = tied and not self.mirrors

    @property
    def modules(self) -> list[nn.Module]:
        """This rank's stages."""
        return [module for _, module in sorted(self.stages.items())]

    def forward_backward(self, micro_batches: Sequence[MicroBatch], report: Report, scale: float) -> list[torch.Tensor]:
        """Accumulate d(scale * sum of all ranks' totals) into the gradients; returns the reports of each micro-batch's sequences."""
        if self.narrow:
            self.narrow.prepare()
        # DDP averages over ranks; everything here is a sum over them.
        self.auxiliary.scale = self.scale = scale * (self.data_ranks if self.wrapped else 1)
        parts = [take_part(batch, self.mesh.place["cp"], self.plan.cp) for batch in micro_batches]
        if self.schedule is not None:
            reports = self._through_the_pipeline(parts, report)
        else:
            assert self.run is not None
            reports = []
            for number, part in enumerate(parts):
                with gradient_sync(self.run, enabled=number == len(parts) - 1):
                    with self._precision():
                        total, nll = self.run(part["tokens"], *(part[name] for name in INPUTS))
                    (total.sum() * self.scale).backward()
                reports.append(report(nll, part))
        self._finish_gradients()
        return self._over_context(reports)

    @torch.no_grad()
    def forward(self, micro_batch: MicroBatch, report: Report) -> torch.Tensor:
        """The reports, without gradients. Collective: every rank calls it equally often; `forward_rows` sequences fill a pipeline."""
        if self.narrow:
            self.narrow.prepare()
        part = take_part(micro_batch, self.mesh.place["cp"], self.plan.cp)
        with self._precision():
            if (group := self.mesh.group("pp")) is None:
                nll = self.modules[0](part["tokens"], *(part[name] for name in INPUTS))[1]
            else:
                nll = forward_only(
                    self.plan, self.stages, _rows_of(part, self.plan.micro_batch), self.hidden, self.stream_dtype, INPUTS, group
                )
        return self._over_context([self._from_last_stage(nll, part, report)])[0]

    def _through_the_pipeline(self, parts: Sequence[MicroBatch], report: Report) -> list[torch.Tensor]:
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        first = (whole["tokens"],) if 0 in self.stages else ()
        out = self.schedule.step(*first, target=whole["labels"], **{f"{name}_BT": whole[name] for name in INPUTS})
        nll = out[1] if out is not None else None
        return list(self._from_last_stage(nll, whole, report).split([len(part["tokens"]) for part in parts]))

    def _from_last_stage(self, nll: torch.Tensor | None, part: MicroBatch, report: Report) -> torch.Tensor:
        """The report, on every rank of a pipeline."""
        if (group := self.mesh.group("pp")) is None:
            assert nll is not None
            return report(nll, part)
        reports = report(torch.zeros_like(part["loss_weight"]) if nll is None else nll, part) * (nll is not None)
        dist.all_reduce(reports, group=group)
        return reports

    def _pipeline_loss(self, output: Any, target: torch.Tensor) -> torch.Tensor:
        return output[0].sum() * self.scale

    def _examples(self, number: int, hidden: tuple[int, ...], length: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What goes into a stage and comes out, on the meta device."""
        state = torch.empty(hidden, dtype=self.stream_dtype, device="meta", requires_grad=True)
        tokens = torch.empty(hidden[0], length, dtype=torch.int32, device="meta")
        losses = (torch.empty(1, device="meta", requires_grad=True), torch.empty(hidden[0], length, device="meta"))
        return (tokens if number == 0 else state,), losses if number == self.plan.stages - 1 else (state,)

    def _over_context(self, reports: list[torch.Tensor]) -> list[torch.Tensor]:
        """Reports are sums over tokens: those of the ranks that share the sequences are added up."""
        if (group := self.mesh.group("cp")) is None:
            return reports
        joined = torch.cat(reports)
        dist.all_reduce(joined, group=group)
        return list(joined.split([len(r) for r in reports]))

    @torch.no_grad()
    def _finish_gradients(self) -> None:
        """Add up what FSDP and DDP know nothing of: gradients computed in parts over tp, and those of tied weights on two stages."""
        assert self.layouts is not None
        for kept, mirror in self.mirrors:
            if mirror.grad is not None:
                kept.grad = mirror.grad if kept.grad is None else kept.grad + mirror.grad
                mirror.grad = None
        if (tp := self.mesh.group("tp")) is not None:
            _sum_together([_local(p.grad) for name, p in self.named if p.grad is not None and self.layouts.by_name[name].split.partial], tp)
        if self.tied_across and self.mesh.tied_group is not None:
            _sum_together([_local(p.grad) for name, p in self.named if name == "embed.weight" and p.grad is not None], self.mesh.tied_group)

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """The norm of the whole model's gradient, fp64, the same bits on every rank."""
        assert self.layouts is not None
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, p in self.named:
            if p.grad is None:
                continue
            copies = self.layouts.copies(name, p) * (2 if self.tied_across and name == "embed.weight" else 1)
            squares += torch.linalg.vector_norm(_local(p.grad)).to(self.device).double().square() / copies
        if (group := self.mesh.group("replica")) is not None:
            dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def step(self, lr: float, clip: float, limit: float = float("inf")) -> float:
        """Clip the global gradient norm, update, clear the gradients; returns the norm before clipping.

        No update is made if it is not finite or above `limit`.
        """
        norm = float(self.gradient_norm())
        if norm < float("inf") and norm <= limit:
            with torch.no_grad():
                for name, p in self.named:
                    held = self.held[name]
                    held.data = _local(p)  # FSDP may have moved it
                    held.grad = None if p.grad is None else _local(p.grad)
                if norm > clip:
                    torch._foreach_mul_([p.grad for p in self.held.values() if p.grad is not None], clip / (norm + 1e-6))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._mirror()
        for module in self.stages.values():
            module.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate [n, ...] of every data rank, in rank order: [n * ranks, ...]; the same bits on every rank."""
        group = self.mesh.group("data")
        return values if group is None else all_gather(values, 0, group)

    def weights(self) -> dict[str, torch.Tensor]:
        """Canonical name -> the live weights; buffers that are part of the model among them."""
        assert self.layouts is not None
        found: dict[str, torch.Tensor] = {}
        for module in self.modules:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()  # after a forward pass alone, weights may still be gathered
            for name, parameter in module.named_parameters():
                found.setdefault(name, self.layouts.canonical(name, parameter))
            found.update(module.named_buffers())
        return found

    def gradients(self) -> dict[str, torch.Tensor]:
        """Canonical name -> the gradient, between `forward_backward` and `step`."""
        assert self.layouts is not None
        return {name: self.layouts.canonical(name, p, _local(p.grad)) for name, p in self.named if p.grad is not None}

    def moments(self) -> dict[str, torch.Tensor]:
        """`{canonical name}.{moment}` -> the live tensor; created as zeros before the first step."""
        assert self.layouts is not None
        found = {}
        for name, p in self.named:
            state = self.optimizer.state[held := self.held[name]]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(held, memory_format=torch.preserve_format)
                found[f"{name}.{moment}"] = self.layouts.canonical(name, p, state[moment])
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
        return found

    def moment_bytes(self) -> int:
        """Bytes of the moments that exist by now."""
        return state_bytes(self.optimizer)

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, as the bias correction counts them."""
        return int(next((s["step"] for s in self.optimizer.state.values() if "step" in s), torch.zeros(())).item())

    def loaded(self, optimizer_steps: int) -> None:
        """To be called when weights and moments were written into: restores the count of updates, and copies of tied weights."""
        self.moments()
        for state in self.optimizer.state.values():
            state["step"].fill_(float(optimizer_steps))
        self._mirror()

    @torch.no_grad()
    def _mirror(self) -> None:
        for kept, mirror in self.mirrors:
            _local(mirror).copy_(_local(kept))

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext()


def _rows_of(part: MicroBatch, size: int) -> list[MicroBatch]:
    """A micro-batch cut into smaller ones."""
    count = len(part["tokens"])
    return [{name: tensor[i : i + size] for name, tensor in part.items()} for i in range(0, count, size)]


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return local_tensor(tensor)


def _sum_together(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """One all-reduce of several tensors, in place."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
