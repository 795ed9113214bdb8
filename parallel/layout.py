"""Where a parameter's slices lie: modules hold plain local tensors, this page knows what part of the canonical tensor they are.

A model declares how each parameter may be split (`ParameterSplit`); `slice_parameters` cuts the still empty parameters to this rank's size, and
`canonical` describes what came of one - after FSDP sharded it too - as a DTensor of the whole, which checkpoints and initialisation read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from regrowth.parallel.dtensor import local_tensor
from regrowth.parallel.mesh import Mesh


@dataclass(frozen=True)
class ParameterSplit:
    """How a parameter is cut.

    Args:
        tp: the dim that tensor parallelism cuts; None leaves it whole on every rank.
        expert: its dim 0 is experts, which `ep` cuts.
        partial: whole, but a rank computes only a part of its gradient: the gradients are summed over tp.
    """

    tp: int | None = None
    expert: bool = False
    partial: bool = False


Declare = Callable[[str], ParameterSplit]


@dataclass(frozen=True)
class Layout:
    """A parameter's whole shape and its slices."""

    shape: torch.Size
    split: ParameterSplit
    over_experts: bool  # its shards are described on the experts' mesh


class Layouts:
    """The layouts of one model's parameters, by canonical name."""

    def __init__(self, mesh: Mesh, declare: Declare) -> None:
        self.mesh, self.declare = mesh, declare
        self.by_name: dict[str, Layout] = {}
        self._meshes: dict[bool, tuple[DeviceMesh | None, tuple[str, ...]]] = {}

    def slice_parameters(self, module: nn.Module) -> None:
        """Cut every parameter, still on the meta device, to this rank's slice; notes the whole shape."""
        plan = self.mesh.plan
        for owner in module.modules():
            prefix = next(name for name, candidate in module.named_modules() if candidate is owner)
            for key, parameter in list(owner.named_parameters(recurse=False)):
                name = f"{prefix}.{key}" if prefix else key
                split, shape = self.declare(name), list(parameter.shape)
                over_experts = split.expert and plan.ep > 1
                self.by_name[name] = Layout(parameter.shape, split, over_experts)
                if split.tp is not None:
                    shape[split.tp] //= plan.tp
                if over_experts:
                    shape[0] //= plan.ep
                if shape != list(parameter.shape):
                    setattr(owner, key, nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad))

    def canonical(self, name: str, parameter: torch.Tensor, held: torch.Tensor | None = None) -> torch.Tensor:
        """This rank's shard as a DTensor of the whole; a plain tensor where nothing is split. Shares storage.

        Args:
            held: what this rank holds of something else that is sharded as the parameter is: a gradient, a moment.
        """
        layout = self.by_name[name]
        sharded = parameter.placements[-1] if isinstance(parameter, DTensor) else None
        local = held if held is not None else local_tensor(parameter)
        mesh, axes = self._mesh(layout.over_experts)
        if mesh is None:
            return local
        cut: dict[str, Placement] = {}
        if layout.split.tp is not None:
            cut["tp"] = Shard(layout.split.tp)
        if layout.over_experts:
            cut["ep"] = Shard(0)
        if isinstance(sharded, Shard):
            cut["shard"] = Shard(sharded.dim)
        placements = [cut.get(axis, Replicate()) for axis in axes]
        stride = torch.empty(layout.shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=layout.shape, stride=stride)

    def _mesh(self, over_experts: bool) -> tuple[DeviceMesh | None, tuple[str, ...]]:
        if over_experts not in self._meshes:
            self._meshes[over_experts] = self.mesh.layout_mesh(over_experts)
        return self._meshes[over_experts]

    def copies(self, name: str, parameter: torch.Tensor) -> int:
        """On how many ranks of one whole replica the same shard lies: what a sum over them must be divided by."""
        layout, plan = self.by_name[name], self.mesh.plan
        shards = plan.tp if layout.split.tp is not None else 1
        if layout.over_experts:
            shards *= plan.ep
        if isinstance(parameter, DTensor):
            shards *= parameter.device_mesh.size() // (plan.dp_replicate if parameter.device_mesh.ndim == 2 else 1)
        return plan.shards_weights * plan.tp // shards
