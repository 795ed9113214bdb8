"""Whether a node can be trusted: its arithmetic, its disk, the memory of its device, and what it takes to talk to the others.

Cheap enough to be done before each start of a run; `regrowth doctor` shows the same with figures.
"""

import errno
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_DISK_BYTES, _REDUCE_BYTES = 1 << 18, 4 << 20  # small: they are moved before every start
_LEAST_FREE = 0.8  # of a device's memory, before a run begins on it
_MEMORY_SECONDS = 30.0  # until a killed process's memory is free


@dataclass(frozen=True)
class Health:
    """What was found; `faults` are sentences with a remedy."""

    faults: list[str]
    write_megabytes_per_second: float = 0.0
    read_megabytes_per_second: float = 0.0


def check(device: torch.device, folder: Path, only_arithmetic: bool = False) -> Health:
    """Look at this rank's device and at the disk under `folder`, without talking to other ranks.

    Args:
        only_arithmetic: leave the disk to another rank of the same node.
    """
    faults = device_faults(device)
    if only_arithmetic:
        return Health(faults)
    written, read, wrong = disk_speed(folder)
    return Health([*faults, *wrong], written, read)


def device_faults(device: torch.device) -> list[str]:
    """A device whose memory another process holds, whose arithmetic is wrong, or that raises whatever it raises."""
    try:
        return _memory_faults(device) or arithmetic_faults(device)
    except Exception as error:  # of a device that is broken, whatever it calls it
        return [f"{device}: {type(error).__name__}: {error}"]


def arithmetic_faults(device: torch.device) -> list[str]:
    """A product of small whole numbers, which every width of arithmetic here has exactly, against the same in double precision on the CPU."""
    rows = torch.arange(256 * 256).reshape(256, 256)
    # -1, 0 and 1, 256 of them: bf16 has every partial sum exactly, in whatever order and width they are added.
    left, right = (rows + rows // 17) % 3 - 1, (rows * 7 + rows // 31) % 3 - 1
    exact = left.double() @ right.double().T
    for dtype in (torch.float32, torch.bfloat16):
        found = left.to(device, dtype) @ right.to(device, dtype).T
        expected = exact.to(dtype)
        if not torch.equal(found.cpu(), expected):
            wrong = int((found.cpu() != expected).sum())
            return [f"a product of matrices in {dtype} is wrong on {device} in {wrong} of {expected.numel()} places; take this node out"]
    return []


def _memory_faults(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    until = time.monotonic() + _MEMORY_SECONDS
    while True:
        free, total = torch.cuda.mem_get_info(device)
        if free + torch.cuda.memory_reserved(device) >= _LEAST_FREE * total:
            return []
        if time.monotonic() > until:
            return [
                f"{device}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; another process holds the rest (nvidia-smi names it)"
            ]
        time.sleep(0.5)


def disk_speed(folder: Path, size: int = _DISK_BYTES) -> tuple[float, float, list[str]]:
    """(MB/s written with a sync, MB/s read back past the cache, faults) of random bytes that are written, read back, compared and removed.

    A disk that is full is no fault here: what needs the room says how much.
    """
    path, data = folder / f".health-{secrets.token_hex(8)}", os.urandom(size)  # many nodes share the folder
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        same = path.read_bytes() == data
        read = time.perf_counter()
        path.unlink()
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return 0.0, 0.0, []
        return 0.0, 0.0, [f"{folder}: cannot be written ({error.strerror}); the run's checkpoints could not either"]
    megabytes = size / 1e6
    faults = [] if same else [f"{folder}: what was written is not what is read back; the disk or its network is broken"]
    return megabytes / max(written - began, 1e-9), megabytes / max(read - written, 1e-9), faults


def reduce_speed(device: torch.device) -> float:
    """GB/s of one tensor through all ranks, which call this together; 0 where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0
    tensor = torch.ones(_REDUCE_BYTES // 4, device=device)
    dist.all_reduce(tensor)  # connects
    began = time.perf_counter()
    dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _REDUCE_BYTES / 1e9 / max(time.perf_counter() - began, 1e-9)
