"""Who is named when a collective fails: read from the signs that the ranks left, in whatever order of time they left them."""

import re
from pathlib import Path

import pytest

from regrowth.parallel.heartbeat import Heartbeat, Phase, explain

TIMED_OUT = RuntimeError("Timed out waiting 6000ms for recv operation to complete")


@pytest.mark.parametrize(
    ("signs", "named"),
    [
        ([(1, 4, "data"), (0, 5, "data")], ["rank 1"]),  # a step behind
        ([(0, 5, "update"), (1, 5, "forward and backward")], ["rank 1"]),  # a phase behind, and yet the later sign
        ([(0, 5, "data"), (1, 5, "data")], ["rank 1"]),  # as far as this one, and yet the later sign
        ([(0, 5, "checkpoint"), (1, 5, "data")], ["rank 1"]),  # stopped while what it sent was still under way
        ([(2, 4, "update"), (0, 5, "data"), (1, 5, "data")], ["rank 2"]),
        ([(2, 5, "data"), (0, 5, "data"), (1, 5, "data")], ["rank 2", "rank 1"]),  # which of them hangs, nobody here can tell
    ],
)
def test_those_that_are_the_least_far_are_named(signs: list[tuple[int, int, Phase]], named: list[str], tmp_path: Path) -> None:
    for rank, step, phase in signs:
        Heartbeat(tmp_path, rank, world_size=len(signs)).beat(step, phase)
    told = explain(tmp_path, TIMED_OUT, 0)
    assert told is not None and told.startswith(f'rank 0 (step {signs[[rank for rank, *_ in signs].index(0)][1]}, "')
    assert re.findall(r"rank \d(?= on)", told.partition("waited in vain for ")[2]) == named


def test_other_errors_are_not_explained(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0, world_size=1).beat(3, "data")
    assert explain(tmp_path, ValueError("shapes differ"), 0) is None
