"""The engine edge: what a training loop needs of whatever runs the model. `NativeEngine` is torch's own parallelism.

An engine is handed micro-batches and a loss function, and speaks canonical names at its edge: `weights` and `moments` are dicts from
canonical name to tensor (plain or DTensor), read and written in place. It knows nothing of data or of loss curves.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from regrowth.parallel.data_parallel import gradient_sync, replicate, shard
from regrowth.parallel.dtensor import full_tensor
from regrowth.parallel.plan import ParallelPlan

MicroBatch = dict[str, torch.Tensor]
# (model, micro-batch) -> (the sum to differentiate, what to report of it)
LossFunction = Callable[[Callable[..., torch.Tensor], MicroBatch], tuple[torch.Tensor, torch.Tensor]]


# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Engine(Protocol):
    """What the loop talks to."""

    data_rank: int
    data_ranks: int

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss: LossFunction, scale: float) -> list[torch.Tensor]: ...

    def forward(self, micro_batch: MicroBatch, loss: LossFunction) -> torch.Tensor: ...

    def step(self, lr: float, clip: float) -> float: ...

    def gather(self, values: torch.Tensor) -> torch.Tensor: ...

    def weights(self) -> dict[str, torch.Tensor]: ...

    def moments(self) -> dict[str, torch.Tensor]: ...


class NativeEngine:
    """One process, replicas (DDP), shards (FSDP2) or both (HSDP), from one plan.

    Args:
        model: on the meta device; its parameters carry canonical names.
        blocks: the model's repeated parts, each sharded and compiled as one.
        mesh: of the plan, from `build_mesh`.
        fill: called once the (possibly sharded) storage exists, to initialise it in place.
        optimizer: builds the optimizer from the named parameters; its state's tensors are the moments.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        plan: ParallelPlan,
        mesh: DeviceMesh | None,
        device: torch.device,
        fill: Callable[[nn.Module], None],
        optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
        autocast: torch.dtype | None = None,
    ) -> None:
        self.plan, self.mesh, self.device, self.autocast = plan, mesh, device, autocast
        self.data_ranks = plan.data_ranks
        self.data_rank = dist.get_rank() if self.mesh is not None else 0  # pp, cp, tp are 1: a rank's place among data ranks is its rank
        if plan.compile:
            for block in blocks:
                block.compile()
        if self.mesh is not None and plan.dp_shard > 1:
            shard(model, blocks, self.mesh, plan)
        model.to_empty(device=device)
        fill(model)
        self.model = model
        self.run: nn.Module = replicate(model, self.mesh) if self.mesh is not None and plan.dp_shard == 1 else model
        self.optimizer = optimizer(dict(model.named_parameters()))

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss: LossFunction, scale: float) -> list[torch.Tensor]:
        """Accumulate d(scale * sum of all ranks' losses) into the gradients; returns what the loss reports of each micro-batch."""
        reports = []
        for number, micro_batch in enumerate(micro_batches):
            with gradient_sync(self.run, enabled=number == len(micro_batches) - 1):
                with self._precision():
                    total, report = loss(self.run, micro_batch)
                # DDP and FSDP average over ranks; the loss is a sum over all of them.
                (total * (scale * self.data_ranks)).backward()
            reports.append(report)
        return reports

    @torch.no_grad()
    def forward(self, micro_batch: MicroBatch, loss: LossFunction) -> torch.Tensor:
        """What the loss reports, without gradients. With shards every rank must call it equally often."""
        with self._precision():
            return loss(self.model, micro_batch)[1]

    def step(self, lr: float, clip: float) -> float:
        """Clip the global gradient norm, update, clear the gradients; returns the norm before clipping (not finite: no update is made)."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        value = float(norm)
        if torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate [n, ...] of every data rank, in rank order: [n * ranks, ...]; the same bits on every rank."""
        if self.mesh is None:
            return values
        out = values.new_empty(values.shape[0] * self.data_ranks, *values.shape[1:])
        _all_gather(out, values.contiguous())
        return out

    def weights(self) -> dict[str, torch.Tensor]:
        """Canonical name -> the live parameter."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def moments(self) -> dict[str, torch.Tensor]:
        """`{canonical name}.{moment}` -> the live tensor; created as zeros before the first step."""
        found = {}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state[p]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(p, memory_format=torch.preserve_format)
                found[f"{name}.{moment}"] = state[moment]
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
        return found

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, as the bias correction counts them."""
        return int(next((s["step"] for s in self.optimizer.state.values() if "step" in s), torch.zeros(())).item())

    def set_optimizer_steps(self, steps: int) -> None:
        """Restore the count after the moments were loaded."""
        self.moments()
        for state in self.optimizer.state.values():
            state["step"].fill_(float(steps))

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext()
