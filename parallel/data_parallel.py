"""Data parallelism: replicas that all-reduce gradients (DDP), or ranks that shard weights, gradients and moments (FSDP2, HSDP)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from regrowth.parallel.plan import ParallelPlan


def shard(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, plan: ParallelPlan) -> None:
    """Shard a model in place over the mesh: each block as one unit, the rest as another. Parameters become DTensors, names stay.

    With replicas too, gradients are reduce-scattered inside a shard group and all-reduced between the groups (HSDP).
    """
    over = mesh["dp_replicate", "dp_shard"] if plan.dp_replicate > 1 else mesh["dp_shard"]
    for block in blocks:
        fully_shard(block, mesh=over)
    fully_shard(model, mesh=over)


def replicate(model: nn.Module, mesh: DeviceMesh) -> DistributedDataParallel:
    """A callable that runs the model and all-reduces its gradients, overlapped with the backward pass. The model itself keeps its names."""
    return DistributedDataParallel(model, process_group=mesh["dp_replicate"].get_group(), gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the backward passes inside communicate: only the last micro-batch of a step needs to."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield
