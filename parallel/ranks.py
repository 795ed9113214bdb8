"""Run a function on N processes joined by gloo, from a pool that is kept: distributed code is then tested like any other.

A start with torch costs seconds, a call on a warm pool milliseconds. The function is named by its module and must be importable there.
"""

import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class RankError(RuntimeError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """`size` worker processes with one torch thread each, which join a gloo group for each call.

    A pool in which a rank failed is thrown away, because the others may wait for it in a collective; the next `run` starts a fresh one.
    """

    def __init__(self, size: int, timeout_seconds: float = 120.0) -> None:
        self.size, self.timeout = size, timeout_seconds
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call the function on every rank; returns their results in rank order.

        Raises:
            RankError: a rank raised, died, or did not answer in time.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args, kwargs))
        results: list[Any] = [None] * self.size
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        until = time.monotonic() + self.timeout
        while waiting:  # whichever answers first: a rank that failed leaves the others waiting for it
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, until - time.monotonic()))
            if not ready:
                late = min(waiting.values())
                self.close()
                raise RankError(f"rank {late} of {self.size}: no answer within {self.timeout} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    process = self._workers[rank][0]
                    process.join(1)
                    ok, results[rank] = False, f"the process died with exit code {process.exitcode}"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {self.size}: {results[rank]}")
        return results

    def close(self) -> None:
        """End the workers."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []
        if self._folder:
            self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, self._folder.name, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def run_ranks(function: Callable[..., Any], size: int, *args: Any, **kwargs: Any) -> list[Any]:
    """One call on a pool of its own."""
    pool = RankPool(size)
    try:
        return pool.run(function, *args, **kwargs)
    finally:
        pool.close()


def _work(rank: int, size: int, folder: str, pipe: Connection) -> None:
    import torch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    for call in itertools.count():
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, _call(Path(folder) / f"store-{call}", rank, size, function, args, kwargs)
        except Exception:
            answer = False, traceback.format_exc()
        gc.collect()  # engines and their groups refer to each other
        pipe.send(answer)


def _call(store: Path, rank: int, size: int, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One call in a group of its own. Groups are not kept from call to call: each has three threads, one of which wakes up a hundred times a second,
    and hundreds of them would stall the machine; and a group made anew under an old name would meet the old one's addresses in the store."""
    import torch.distributed as dist

    if size == 1:
        return function(*args, **kwargs)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=100))
    try:
        dist.barrier()  # nobody goes home while another still knocks
        result = function(*args, **kwargs)
        if dist.is_initialized():
            dist.barrier()
        return result
    finally:
        if dist.is_initialized():
            # DeepSpeed keeps groups of its own accord, and forgets them where it is asked to end them.
            deepspeed = sys.modules.get("deepspeed.comm.comm")
            (deepspeed if deepspeed and deepspeed.cdb else dist).destroy_process_group()  # pyright: ignore[reportAttributeAccessIssue]
