"""Batches built ahead: while a step trains, a thread builds this rank's share of the next ones.

A policy that learns is asked one step early, which needs an `update_delay` of 2 or more; with 1 every batch is waited for. Not earlier: its state would
be past what the next step's draw has to see, and a resumed run would draw otherwise. What was planned ahead is not part of the loader's state, so
stopping loses and repeats nothing.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

from regrowth.data_pipeline.batch import Batch
from regrowth.data_pipeline.loader import Loader
from regrowth.errors import Exhausted

Prepared = TypeVar("Prepared")


class Feed(Generic[Prepared]):
    """What one data-parallel rank reads of each step.

    Args:
        rank, ranks: this rank's share of a step's sequences is the `rank`-th of `ranks` equal parts.
        prepare: what is done with a batch in the thread (cut, pinned, sent to the device).
        steps: where the run ends; nothing is planned beyond.
    """

    def __init__(self, loader: Loader, rank: int, ranks: int, prepare: Callable[[Batch], Prepared], steps: int) -> None:
        self.loader, self.rank, self.ranks, self.prepare, self.steps = loader, rank, ranks, prepare, steps
        self.ahead = min(loader.config.prefetch, 1) if loader.mixer.learns else loader.config.prefetch
        self.waited = 0.0  # seconds for the last batch
        self._planned: dict[int, tuple[list[int], Future[Any]]] = {}
        self._pool = ThreadPoolExecutor(1, "batches")

    def take(self, step: int, waiting: Callable[[float], None] = lambda seconds: None) -> tuple[list[int], Prepared]:
        """The sample ids of a step's global batch, and this rank's share of it, prepared.

        Args:
            waiting: called with the seconds waited so far, each second until the share is there.

        Raises:
            UserError: a shard is damaged, a domain exhausted, a log to follow at its end.
        """
        self._plan(step)
        for ahead in range(step + 1, min(step + 1 + self.ahead, self.steps)):
            if not self.loader.may_plan(ahead):
                break
            try:
                self._plan(ahead)
            except Exhausted:  # raised again in its turn, when the steps before it are trained
                break
        ids, future = self._planned.pop(step)
        began = time.perf_counter()
        while not wait([future], timeout=1.0).done:
            waiting(time.perf_counter() - began)
        prepared = future.result()
        self.waited = time.perf_counter() - began
        return ids, prepared

    def close(self) -> None:
        """Forget what was planned and end the thread."""
        self._planned = {}
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, step: int) -> None:
        if step not in self._planned:
            ids = self.loader.plan_step(step)
            self._planned[step] = ids, self._pool.submit(self._build, step, ids)

    def _build(self, step: int, ids: list[int]) -> Prepared:
        share = len(ids) // self.ranks
        batch = self.loader.build(ids[self.rank * share : (self.rank + 1) * share], step)
        return self.prepare(batch.cut(self.loader.config.length_at(step)))
