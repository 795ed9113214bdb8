"""Data parallelism: replicas that all-reduce gradients (DDP), or ranks that shard weights, gradients and moments (FSDP2, HSDP).

Gradients are *summed* over ranks, never averaged: the loss is a sum over tokens, scaled once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from regrowth.parallel.mesh import Mesh


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], experts: Sequence[nn.Module], mesh: Mesh, dtype: torch.dtype | None = None
) -> None:
    """Shard a model in place: each block as one unit, its experts as another where `ep` splits them, the rest as the last.

    Parameters become DTensors, names stay. With replicas, gradients are reduce-scattered within shards and all-reduced between replicas (HSDP).

    Args:
        dtype: of the weights that are gathered to compute with; the shards stay fp32 masters, and gradients are summed in fp32. None: fp32 too.
    """
    plan = mesh.plan
    options: dict[str, Any] = {
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if plan.offload else OffloadPolicy(),
        # What goes into a block keeps its dtype: tables of angles and weights of tokens are fp32 for a reason.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False),
    }
    apart: set[nn.Parameter] = set()
    if plan.ep > 1:
        apart = {parameter for module in experts for parameter in module.parameters()}
        size = mesh.size("efsdp")
        if size * plan.dp_replicate > 1:
            over = mesh.fsdp_mesh(experts=True)
            for module in experts:
                fully_shard(module, mesh=over, reshard_after_forward=plan.reshards, shard_placement_fn=_even_dim(size), **options)
    if mesh.size("fsdp") * plan.dp_replicate > 1:
        over, place = mesh.fsdp_mesh(), _even_dim(mesh.size("fsdp"))
        for block in blocks:
            inside = apart & set(block.parameters())
            fully_shard(
                block, mesh=over, reshard_after_forward=plan.reshards, shard_placement_fn=place, ignored_params=inside or None, **options
            )
        fully_shard(model, mesh=over, shard_placement_fn=place, ignored_params=apart or None, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A plain sum: gloo has no other, and nothing is averaged here.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _even_dim(size: int) -> Any:
    """Shard along the first dim that divides evenly (stacked experts are fewer than ranks), or along the first."""

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(next((dim for dim, length in enumerate(parameter.shape) if length % size == 0), 0))

    return place


def replicate(model: nn.Module, mesh: Mesh) -> DistributedDataParallel:
    """A callable that runs the model and all-reduces its gradients, overlapped with the backward pass. The model itself keeps its names."""
    return DistributedDataParallel(model, process_group=mesh.group("dp_replicate"), gradient_as_bucket_view=True, broadcast_buffers=False)


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the backward passes inside communicate gradients: only the last micro-batch of a step needs to."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)
    yield
