"""Run a function on N processes joined by gloo, from a pool that is kept: distributed code is then tested like any other.

A start with torch costs seconds, a call on a warm pool milliseconds. The function is named by its module and must be importable there.
"""

import multiprocessing
import multiprocessing.connection
import os
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
    """`size` worker processes with one torch thread each and an initialised gloo group.

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
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, store, there), daemon=True)
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


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=100))
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
