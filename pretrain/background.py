"""Checkpoints written beside training: the loop waits only while weights and moments are copied, a thread writes the copy.

What is written, and how, is `save_checkpoint`'s: manifest last, then renamed, so that a copy whose writing is cut off never hides the
checkpoint before it. The thread's collectives run on a group of its own and cannot meet those of training. One checkpoint is on its way at a
time; the next one waits for it.
"""

import copy
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from regrowth.parallel.dtensor import local_tensor
from regrowth.pretrain.checkpoint import CheckpointState, save_checkpoint


@dataclass(frozen=True)
class Saved:
    """A checkpoint that stands, and what it cost."""

    path: Path
    step: int
    stall_seconds: float  # for which the loop stood still
    write_seconds: float


class BackgroundSaver:
    """Called by every rank at the same steps."""

    def __init__(self, world_size: int, timeout_seconds: float) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)) if world_size > 1 else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Saved | None = None

    @property
    def failed(self) -> bool:
        """Whether the write on its way has failed on this rank; `wait` raises why."""
        return self._error is not None

    def start(
        self,
        path: Path,
        step: int,
        weights: dict[str, torch.Tensor],
        moments: dict[str, torch.Tensor],
        state: CheckpointState,
        logs: Sequence[Path] = (),
    ) -> Saved | None:
        """Copy, and begin to write; returns what was still on its way. `logs`: as `save_checkpoint` takes them.

        Raises:
            RunFailed: the one before could not be written.
        """
        began = time.perf_counter()
        before = self.wait()
        state = copy.deepcopy(state)  # the loader's goes on living
        copies = [self._stage(kind, tensors) for kind, tensors in (("model", weights), ("optimizer", moments))]
        stall = time.perf_counter() - began
        save = partial(save_checkpoint, path, *copies, state, group=self._group, logs=logs)
        self._thread = threading.Thread(target=self._write, args=(save, Saved(path, step, stall, 0.0)), daemon=True, name="checkpoint")
        self._thread.start()
        return before

    def finished(self) -> Saved | None:
        """The checkpoint that was on its way, once it stands; does not wait."""
        if self._thread is None or self._thread.is_alive() or self._error is not None:
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Until nothing is on its way; returns what stands now.

        Raises:
            RunFailed: it could not be written. Older checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        saved, self._saved = self._saved, None
        return saved

    def _stage(self, kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        staged = {}
        for name, tensor in tensors.items():
            local = local_tensor(tensor)
            buffer = self._buffers.get(key := f"{kind}/{name}")
            if buffer is None or buffer.shape != local.shape:
                buffer = self._buffers[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            buffer.copy_(local, non_blocking=True)
            # The constructor rather than `from_local`, which would move the copy to the mesh's device.
            staged[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _write(self, save: Callable[[], str], saved: Saved) -> None:
        began = time.perf_counter()
        _step_back()
        try:
            save()
            self._saved = replace(saved, write_seconds=time.perf_counter() - began)
        except BaseException as error:
            self._error = error


def _step_back() -> None:
    """Give this thread's turn on a busy core to the others: where training computes on all cores, its threads wait for the one that is held up."""
    if sys.platform == "linux":  # where priorities are a thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
