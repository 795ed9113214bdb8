"""DeepSpeed behind the engine edge: ZeRO-1 over the data ranks, with our model, optimizer and checkpoints.

A thin second engine that proves the edge. DeepSpeed partitions the optimizer's state; weights are whole on every rank. Its moments live in
flat buffers, so `moments` hands out copies, and `loaded` writes back what was read into them.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from regrowth.errors import need
from regrowth.parallel.collectives import all_gather
from regrowth.parallel.engine import INPUTS, MicroBatch, Report, state_bytes
from regrowth.parallel.mesh import Mesh

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """ZeRO-1 in fp32, or in autocast over fp32 weights.

    Args:
        model: the whole model on the meta device.
        fill: initialises canonical weights in place.
        optimizer: builds a torch optimizer with Adam's moments from (name, parameter) pairs.

    Raises:
        UserError: deepspeed is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        fill: Callable[[dict[str, torch.Tensor]], None],
        optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        autocast: torch.dtype | None = None,
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
        deepspeed = need("deepspeed", 'parallel.engine = "deepspeed"')
        self._utils = need("deepspeed.utils", 'parallel.engine = "deepspeed"')
        self.plan, self.mesh, self.device = mesh.plan, mesh, mesh.device
        self.data_ranks, self.data_rank = mesh.plan.data_ranks, mesh.data_rank
        self.forward_rows = mesh.plan.micro_batch
        self.model = model.to_empty(device=mesh.device)
        fill(self.weights())
        if autocast:  # inside of the model: DeepSpeed switches off what is around its engine
            model.forward = torch.autocast(mesh.device.type, dtype=autocast)(model.forward)
        config = {
            "train_micro_batch_size_per_gpu": mesh.plan.micro_batch,
            "gradient_accumulation_steps": 1,  # the loop says itself when a step ends
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 1.0,
            "wall_clock_breakdown": False,
        }
        built = optimizer([(name, p) for name, p in model.named_parameters() if p.requires_grad])
        self._engine, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=built, config=config)
        self._given: dict[str, torch.Tensor] = {}
        for part in self._zero.single_partition_of_fp32_groups:  # so that moments can be read and written before the first step
            state = {"step": torch.tensor(0.0), **{moment: torch.zeros_like(part) for moment in _MOMENTS}}
            self._zero.optimizer.state[part] = state
        self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def modules(self) -> list[nn.Module]:
        """The model."""
        return [self.model]

    def forward_backward(self, micro_batches: Sequence[MicroBatch], report: Report, scale: float) -> list[torch.Tensor]:
        """See `NativeEngine`."""
        reports = []
        model: Any = self.model
        model.parallel.auxiliary.scale = scale * self.data_ranks
        for number, batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            total, nll = self._engine(batch["tokens"], *(batch[name] for name in INPUTS))
            # DeepSpeed averages over ranks; the loss is a sum over all of them.
            self._engine.backward(total.sum() * (scale * self.data_ranks))
            reports.append(report(nll, batch))
        return reports

    @torch.no_grad()
    def forward(self, micro_batch: MicroBatch, report: Report) -> torch.Tensor:
        """See `NativeEngine`."""
        return report(self.model(micro_batch["tokens"], *(micro_batch[name] for name in INPUTS))[1], micro_batch)

    def step(self, lr: float, clip: float, limit: float = float("inf")) -> float:
        """See `NativeEngine`."""
        norm = float(self._zero.scaled_global_norm())
        norm = float("nan") if norm < 0 else norm  # its sign for a gradient that is not finite
        if not (norm < float("inf") and norm <= limit):
            self._zero.zero_grad()
            self._engine.zero_grad()
            return norm
        self._zero.clip_grad = clip
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return norm

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """See `NativeEngine`."""
        group = self.mesh.group("data")
        return values if group is None else all_gather(values, 0, group)

    def weights(self) -> dict[str, torch.Tensor]:
        """Canonical name -> the live weights, whole on every rank."""
        return {name: tensor.detach() for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())}

    def moments(self) -> dict[str, torch.Tensor]:
        """`{canonical name}.{moment}` -> a copy, whole on every rank; what is read into it counts once `loaded` is called. Collective."""
        read = self._utils.safe_get_full_optimizer_state
        self._given = {f"{name}.{m}": read(p, m) for name, p in self.model.named_parameters() if p.requires_grad for m in _MOMENTS}
        return self._given

    def moment_bytes(self) -> int:
        """See `NativeEngine`."""
        return state_bytes(self._zero.optimizer)

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, as the bias correction counts them."""
        return int(next(iter(self._zero.optimizer.state.values()))["step"])

    def loaded(self, optimizer_steps: int) -> None:
        """To be called when weights and moments were written into."""
        self._zero.refresh_fp32_params()
        for name, p in self.model.named_parameters():
            for moment in _MOMENTS:
                if (value := self._given.get(f"{name}.{moment}")) is not None:
                    self._utils.safe_set_full_optimizer_state(p, value, moment)
        self._given = {}
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(float(optimizer_steps))
