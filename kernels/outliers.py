"""Outliers of activations: the quantiles of a tensor, and what lies beyond them (OCC, arXiv 2501.17116)."""

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


@torch.no_grad()
def clamp_outliers(x: torch.Tensor, quantile: float, group: Group = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [...] fp32 clamped to its quantiles 1 - `quantile` and `quantile`, and what was cut off, whose sum with the first is x.

    Args:
        group: ranks that hold the other slices of the tensor; the quantiles are of the whole.
    """
    count = torch.tensor(x.numel(), device=x.device)
    if group is not None:
        dist.all_reduce(count, group=group)
    n = int(count)
    if n == 0:
        return x, torch.zeros_like(x)
    beyond = min(n - 1, int((1 - quantile) * n))  # so many may lie outside on either side
    low, high = (smallest(x, rank, group) for rank in (beyond + 1, n - beyond))
    inside = x.clamp(low, high)
    return inside, x - inside


@torch.no_grad()
def smallest(x: torch.Tensor, rank: int, group: Group = None) -> torch.Tensor:
    """The value that is the `rank`-th smallest (from 1) of a tensor fp32, or of all slices that a group holds: exact, the same on each of its ranks."""
    if group is None:
        return x.flatten().kthvalue(rank).values
    # fp32 values in order are int32 keys in order, once those of negative values are turned round: 32 counts find the key.
    bits = x.flatten().view(torch.int32).long()
    keys = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF) - 1)
    low, high = -(1 << 31), (1 << 31) - 1
    while low < high:
        middle = (low + high) >> 1
        below = (keys <= middle).sum()
        dist.all_reduce(below, group=group)
        low, high = (low, middle) if int(below) >= rank else (middle + 1, high)
    found = torch.tensor(low if low >= 0 else (-(low + 1)) | -(1 << 31), device=x.device)
    return found.to(torch.int32).view(torch.float32)
