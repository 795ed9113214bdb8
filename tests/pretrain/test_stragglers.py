"""Slow ranks are named: by what they take alone, twice in a row, with their hosts."""

import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from regrowth.parallel.ranks import RankPool
from regrowth.pretrain import stragglers
from regrowth.pretrain.config import SupervisionConfig
from regrowth.pretrain.stragglers import Stragglers, probe_seconds, slower


def test_slower_is_by_the_median_and_with_two_ranks_by_the_other_one() -> None:
    assert slower(np.array([1.0, 1.1, 0.9, 2.0]), 1.5) == {3: 2.0 / 1.05}
    assert slower(np.array([1.0, 1.4, 0.9, 1.2]), 1.5) == {}
    assert slower(np.array([3.0, 1.0]), 1.5) == {0: 3.0}
    assert slower(np.array([0.0, 0.0, 0.0, 1.0]), 1.5).keys() == {3}, "the others did not wait at all"


def test_the_probe_measures_something() -> None:
    assert 0 < probe_seconds(torch.device("cpu")) < 10


def looks(slow_steps: tuple[int, ...], late_steps: tuple[int, ...], every: int) -> list[dict[str, Any]]:
    """What is told in 12 steps, with rank 1 slow in some and its data late in others.."""
    import torch.distributed as dist

    watch, rank, told = Stragglers(SupervisionConfig(straggler_every=every), torch.device("cpu")), dist.get_rank(), []
    original = stragglers.probe_seconds
    try:
        for step in range(12):
            slow = rank == 1 and step in slow_steps
            stragglers.probe_seconds = lambda device, slow=slow: 1.0 if slow else 0.1  # type: ignore[assignment]
            time.sleep(0.02)
            told += watch.look(step, 0.02 if rank == 1 and step in late_steps else 0.0)
    finally:
        stragglers.probe_seconds = original  # type: ignore[assignment]
    return told


def test_a_slow_rank_is_named_after_two_looks_and_once(ranks: Callable[[int], RankPool]) -> None:
    everywhere = ranks(2).run(looks, (3, 5, 7), (), 2)
    assert everywhere[0] == everywhere[1], "all ranks know the same"
    assert everywhere[0] == [
        {"event": "straggler", "step": 5, "rank": 1, "host": socket.gethostname(), "what": "arithmetic", "times": 10.0},
        {"event": "straggler recovered", "step": 9, "rank": 1, "host": socket.gethostname(), "what": "arithmetic"},
    ]
    assert ranks(2).run(looks, (5,), (), 2) == [[], []], "once is chance"
    assert ranks(2).run(looks, tuple(range(12)), (), 0) == [[], []], "not asked for"


def test_late_data_is_told_apart(ranks: Callable[[int], RankPool]) -> None:
    (told, *_), _ = ranks(2).run(looks, (), tuple(range(12)), 3)
    assert (told["what"], told["rank"], told["step"]) == ("data", 1, 5) and told["times"] > 1.5
