"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

A token chooses k experts: that is k rows to compute. Rows are sorted by expert, exchanged by all-to-all (as many as each rank needs: nothing is
padded), sorted again by the receiver's experts, and go back the same way. Every permutation has distinct indices, so sums are taken
in one order on any device.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from regrowth.parallel.collectives import Group, exchange

# (rows [n, D] sorted by local expert, rows per local expert, the rows' numbers [n] if they have any) -> [n, D]
RunExperts = Callable[[torch.Tensor, list[int], torch.Tensor | None], torch.Tensor]


def run_on_experts(
    rows_ND: torch.Tensor,
    expert_N: torch.Tensor,
    experts: int,
    run: RunExperts,
    group: Group = None,
    index_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row's expert applied to it, in the order of the rows.

    Args:
        rows_ND: one row per (token, choice).
        expert_N: int64, its expert in 0..experts - 1, or -1 for none: such rows come back as zeros.
        run: applies this rank's experts; with a group, rank r of it holds experts r * experts / size and following.
        index_N: int64, a number of each row that travels with it.
    """
    order = torch.argsort(torch.where(expert_N < 0, experts, expert_N), stable=True)
    counts = torch.bincount(expert_N[expert_N >= 0], minlength=experts)
    dealt = int(counts.sum())
    order = order[:dealt]
    gathered = rows_ND.index_select(0, order)
    index = None if index_N is None else index_N.index_select(0, order)
    if group is None:
        computed = run(gathered, counts.tolist(), index)
    else:
        computed = _over_ranks(gathered, counts, run, group, index)
    return torch.zeros_like(rows_ND, dtype=computed.dtype).index_copy(0, order, computed)


def _over_ranks(
    rows: torch.Tensor, counts: torch.Tensor, run: RunExperts, group: dist.ProcessGroup, index: torch.Tensor | None
) -> torch.Tensor:
    size = group.size()
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts, group=group)  # [rank, local expert]: rows that each rank sends to each of mine
    sent, by_rank = counts.view(size, -1).sum(1).tolist(), coming.view(size, -1)
    received = by_rank.sum(1).tolist()
    here = exchange(rows, sent, received, group)
    local = torch.arange(by_rank.shape[1], device=rows.device).repeat(size).repeat_interleave(coming)
    order = torch.argsort(local, stable=True)
    if index is not None:
        index = exchange(index, sent, received, group).index_select(0, order)
    computed = run(here.index_select(0, order), by_rank.sum(0).tolist(), index)
    back = torch.zeros_like(computed).index_copy(0, order, computed)
    return exchange(back, received, sent, group)
