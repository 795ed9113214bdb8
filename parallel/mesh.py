"""Process groups: one start and one stop, and a mesh with every axis named, also those of size 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from regrowth.errors import UserError
from regrowth.parallel.plan import ParallelPlan

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # slowest to fastest: tp's ranks are neighbours


def choose_device(name: str) -> torch.device:
    """`auto` is this rank's GPU where every rank of this machine has one, else the CPU.

    Raises:
        UserError: "cuda" was asked for and torch has too few GPUs here.
    """
    gpus, ranks = torch.cuda.device_count() if torch.cuda.is_available() else 0, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if gpus >= ranks else "cpu"
    if name == "cuda":
        if gpus < ranks:
            raise UserError(
                f'run.device = "cuda": {ranks} ranks on this machine and {gpus} GPUs that torch can use. Use "cpu", or a plan of fewer ranks.'
            )
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)


@contextmanager
def process_group(device: torch.device, timeout_seconds: float = 600.0) -> Iterator[tuple[int, int]]:
    """Join the group that the launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) describes; yields (rank, world size).

    Alone, no group is made.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def build_mesh(plan: ParallelPlan, device: torch.device) -> DeviceMesh | None:
    """The mesh of a plan over all ranks; None for a single process."""
    if plan.world_size == 1:
        return None
    return init_device_mesh(device.type, tuple(getattr(plan, axis) for axis in AXES), mesh_dim_names=AXES)
