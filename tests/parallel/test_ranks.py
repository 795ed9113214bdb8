"""The pool of ranks: real processes, reused, and honest about failure."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from regrowth.errors import RunFailed, UserError
from regrowth.parallel.agree import on_first_rank
from regrowth.parallel.ranks import RankError, RankPool

Ranks = Callable[[int], RankPool]


def rank_and_sum() -> tuple[int, int, float]:
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    return os.getpid(), dist.get_rank(), x.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("a reason")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def agree(fails: bool) -> str:
    def first() -> str:
        assert dist.get_rank() == 0
        if fails:
            raise UserError("the letter")
        return "yes"

    try:
        return on_first_rank(first)
    except UserError as error:
        return f"refused: {error}"


def agree_on_a_bug() -> str:
    try:
        return on_first_rank(lambda: 1 // 0)  # type: ignore[return-value]
    except (ZeroDivisionError, RunFailed) as error:
        return f"{type(error).__name__}"


def test_functions_run_on_every_rank_of_a_pool_that_is_kept(ranks: Ranks) -> None:
    first = ranks(2).run(rank_and_sum)
    second = ranks(2).run(rank_and_sum)
    assert [r[1:] for r in first] == [(0, 3.0), (1, 3.0)]
    assert [r[0] for r in first] == [r[0] for r in second], "the same processes"


@pytest.mark.parametrize("function", [fail_on, die_on])
def test_a_rank_that_fails_or_dies_is_named_and_the_pool_starts_afresh(function: Callable[[int], None]) -> None:
    pool = RankPool(2, timeout_seconds=20)
    try:
        with pytest.raises(RankError, match=r"rank \d of 2: .*"):
            pool.run(function, 1)
        assert [r[2] for r in pool.run(rank_and_sum)] == [3.0, 3.0]
    finally:
        pool.close()


def test_ranks_agree_on_the_first_ranks_outcome(ranks: Ranks) -> None:
    assert ranks(2).run(agree, False) == ["yes", "yes"]
    assert ranks(2).run(agree, True) == ["refused: the letter"] * 2
    assert ranks(2).run(agree_on_a_bug) == ["ZeroDivisionError", "RunFailed"]
