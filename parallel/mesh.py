"""Process groups: one start and one stop, and a mesh of ranks with every axis named, also those of size 1.

Groups over several axes at once (data ranks, FSDP's shards, the whole model) are made here once, by the same calls in the same order on every
rank; `DeviceMesh`es for FSDP2 and for checkpoints are put together from them.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from regrowth.errors import UserError
from regrowth.parallel.agree import set_timeout
from regrowth.parallel.plan import AXES, ParallelPlan


def choose_device(name: str) -> torch.device:
    """`auto` is this rank's GPU where every rank of this machine has one, else the CPU. Where REGROWTH_OWN_GPU is set, a rank that sees one GPU has it for itself.

    Raises:
        UserError: "cuda" was asked for and torch has too few GPUs here.
    """
    gpus, ranks = torch.cuda.device_count() if torch.cuda.is_available() else 0, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own = gpus == 1 and "REGROWTH_OWN_GPU" in os.environ
    if own:
        ranks = 1
    if name == "auto":
        name = "cuda" if gpus >= ranks else "cpu"
    if name == "cuda":
        if gpus < ranks:
            raise UserError(
                f'run.device = "cuda": {ranks} ranks on this machine and {gpus} GPUs that torch can use. Use "cpu", or a plan of fewer ranks.'
            )
        local = 0 if own else int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)


def _meeting(world_size: int, timeout: timedelta) -> dict[str, Any]:
    """Where the ranks meet, as `init_process_group` takes it; empty where torch reads the environment itself."""
    address, port, rank = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), int(os.environ.get("RANK", 0))
    if store := os.environ.get("REGROWTH_STORE"):
        return {"init_method": f"file://{store}", "rank": rank, "world_size": world_size}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not is_address(address) or not port.isdecimal():
        return {}
    listening = None if rank else listen_on(address, int(port))
    store = dist.TCPStore(address, int(port), world_size, rank == 0, timeout, multi_tenant=True, master_listen_fd=listening)
    return {"store": store, "rank": rank, "world_size": world_size}


def is_address(host: str) -> bool:
    """Whether this is a number and no name, so that all hosts mean the same by it."""
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False


def listen_on(address: str, port: int) -> int:
    """A listening socket on this address alone, where torch's own store would listen on all networks of the host; its descriptor."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=2048).detach()


@contextmanager
def process_group(device: torch.device, timeout_seconds: float = 600.0) -> Iterator[tuple[int, int]]:
    """Join the group that the launcher's environment describes; yields (rank, world size).

    RANK and WORLD_SIZE, and where the ranks meet: MASTER_ADDR and MASTER_PORT, or REGROWTH_STORE, a file that ranks of one machine meet at without a port.

    Alone, no group is made. Within a group, that one stays, and gets this time-out.

    Raises:
        UserError: the port is another process's.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or dist.is_initialized():
        set_timeout(timeout_seconds)
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(backend, timeout=timeout, **_meeting(world_size, timeout))
    except (dist.DistNetworkError, OSError) as error:
        if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
            raise
        raise UserError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')}: another process of {socket.gethostname()} listens there. Give all ranks another port, "
            "or let torchrun choose a free one (--standalone, --rdzv-endpoint HOST:0)."
        ) from error
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


class Mesh:
    """The ranks of a plan as a grid (pp, dp_replicate, dp_shard, cp, tp), and this rank's place in it.

    Experts have a grid of their own over the same ranks: dp_shard x cp is `efsdp` (shards of an expert) x `ep` (experts).
    """

    # Groups that the engines use, by name: the axes that vary within one.
    GROUPS: dict[str, tuple[str, ...]] = {
        "pp": ("pp",),
        "dp_replicate": ("dp_replicate",),
        "fsdp": ("dp_shard", "cp"),
        "data": ("dp_replicate", "dp_shard"),
        "cp": ("cp",),
        "tp": ("tp",),
        "sequence": ("cp", "tp"),  # those that share a micro-batch
        "replica": ("pp", "dp_shard", "cp", "tp"),  # one whole model
    }

    def __init__(self, plan: ParallelPlan, device: torch.device, timeout_seconds: float | None = None) -> None:
        self.plan, self.device, self.timeout_seconds = plan, device, timeout_seconds
        self.rank = dist.get_rank() if plan.world_size > 1 else 0
        grid = np.arange(plan.world_size).reshape([getattr(plan, axis) for axis in AXES])
        self.grid = grid
        self.place: dict[str, int] = {axis: int(i) for axis, i in zip(AXES, np.argwhere(grid == self.rank)[0], strict=True)}
        pp, replicate, tp = plan.pp, plan.dp_replicate, plan.tp
        experts = grid.reshape(pp, replicate, plan.shards_weights // plan.ep, plan.ep, tp)
        self._groups: dict[str, dist.ProcessGroup | None] = {}
        self._sizes: dict[str, int] = {}
        for name, axes in self.GROUPS.items():
            self._make(name, grid, [AXES.index(axis) for axis in axes])
        self._make("efsdp", experts, [2])
        self._make("ep", experts, [3])
        # Tied weights live on the first and the last stage.
        self.tied_group: dist.ProcessGroup | None = None
        if plan.pp > 1:
            column = np.moveaxis(grid, 0, -1).reshape(-1, pp)
            mine = column[np.argwhere(column == self.rank)[0][0]]
            # Groups that members make for themselves are named by how many a rank has made: stages in the middle make one too, of their own.
            ends = self.place["pp"] in (0, pp - 1)
            group = self._new_group(mine[[0, -1]] if ends else np.array([self.rank]))
            self.tied_group = group if ends else None
        # For axes of one rank. Made at once, on all ranks: groups are named by how many a rank has made, in this mesh and in those before it.
        self._groups["alone"] = self._new_group(np.array([self.rank])) if plan.world_size > 1 else None
        self.expert_place = {name: int(i) for name, i in zip(("efsdp", "ep"), np.argwhere(experts == self.rank)[0][2:4], strict=True)}
        self._experts = experts

    def _make(self, name: str, grid: np.ndarray, axes: Sequence[int]) -> None:
        size = int(np.prod([grid.shape[axis] for axis in axes]))
        self._sizes[name], self._groups[name] = size, None
        if size == 1:
            return
        rows = np.moveaxis(grid, axes, range(-len(axes), 0)).reshape(-1, size)
        if len(rows) == 1:
            self._groups[name] = dist.group.WORLD
            return
        self._groups[name] = self._new_group(rows[np.argwhere(rows == self.rank)[0][0]])

    def _new_group(self, ranks: np.ndarray) -> dist.ProcessGroup:
        return _new_group(ranks, self.timeout_seconds)

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of this rank along an axis or a named set of axes; None where it would hold this rank alone."""
        return self._groups[name]

    def size(self, name: str) -> int:
        """Ranks in a group."""
        return self._sizes[name]

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank reads."""
        return self.place["dp_replicate"] * self.plan.dp_shard + self.place["dp_shard"]

    def fsdp_mesh(self, experts: bool = False) -> DeviceMesh:
        """What `fully_shard` takes: the shards of this rank's stage and tensor slice, with its replicas as the first dim where there are any."""
        name, source = ("efsdp", self._experts) if experts else ("fsdp", self.grid)
        place = [self.place["pp"], slice(None), slice(None), slice(None), self.place["tp"]]
        if experts:
            place[3] = self.expert_place["ep"]
        ranks = torch.from_numpy(source[tuple(place)].reshape(self.plan.dp_replicate, -1))
        if self.plan.dp_replicate == 1:
            return self._device_mesh(ranks[0], ("shard",), (name,))
        return self._device_mesh(ranks, ("replicate", "shard"), ("dp_replicate", name))

    def layout_mesh(self, experts: bool = False) -> tuple[DeviceMesh | None, tuple[str, ...]]:
        """The mesh that a parameter's shards are described on, and its axes: those of (ep,) tp and FSDP's shards that split anything.

        FSDP's come last, because they cut what the others left of a tensor. None where nothing is split.
        """
        replica = self.place["dp_replicate"]
        if experts:
            ranks = self._experts[self.place["pp"], replica].transpose(1, 2, 0)
            names, groups = ("ep", "tp", "shard"), ("ep", "tp", "efsdp")
        else:
            ranks = self.grid[self.place["pp"], replica].reshape(-1, self.plan.tp).transpose()
            names, groups = ("tp", "shard"), ("tp", "fsdp")
        chosen = [(name, group) for name, group, size in zip(names, groups, ranks.shape, strict=True) if size > 1]
        if not chosen:
            return None, ()
        names, groups = (tuple(column) for column in zip(*chosen, strict=True))
        return self._device_mesh(torch.from_numpy(ranks.squeeze().copy()), names, groups), names

    def _device_mesh(self, ranks: torch.Tensor, names: tuple[str, ...], groups: tuple[str, ...]) -> DeviceMesh:
        handles = [self._groups[name] or self._groups["alone"] for name in groups]
        assert all(handle is not None for handle in handles)
        # One group stands for a mesh of one dim, and then `mesh` is derived from it.
        if len(handles) == 1:
            return DeviceMesh.from_group(handles[0], self.device.type, mesh_dim_names=names)  # pyright: ignore[reportArgumentType]
        return DeviceMesh.from_group(handles, self.device.type, mesh=ranks, mesh_dim_names=names)  # pyright: ignore[reportArgumentType]


def _new_group(ranks: np.ndarray, timeout_seconds: float | None) -> dist.ProcessGroup:
    """A group that only its members make: ten thousand ranks need not take part in each other's."""
    patience = timedelta(seconds=timeout_seconds) if timeout_seconds else None
    group = dist.new_group([int(rank) for rank in ranks], timeout=patience, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
