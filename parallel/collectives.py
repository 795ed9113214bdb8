"""Collectives that autograd can pass through. Each names its counterpart, so that a pair of them is its own proof."""

from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None

# torch 2.13 renamed them.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate every rank's x along `dim`; no gradient."""
    size = group.size()
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    _all_gather_into(out, x.contiguous(), group=group)
    if dim == 0:
        return out
    return torch.cat(out.chunk(size, dim=0), dim=dim)


def reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum every rank's x and keep this rank's part along `dim`; no gradient."""
    size = group.size()
    stacked = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim=dim), dim=0)
    out = x.new_empty(stacked.shape[0] // size, *stacked.shape[1:])
    _reduce_scatter_into(out, stacked, group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_scatter(grads[0], ctx.dim, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.group), None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        out = grads[0].new_empty(sum(ctx.sent), *grads[0].shape[1:])
        dist.all_to_all_single(out, grads[0].contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None


def gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """All-gather along `dim`; the gradient is summed and scattered."""
    return x if group is None else _Gather.apply(x, dim, group)  # pyright: ignore[reportReturnType]


def scatter_sum(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Sum over ranks, scattered along `dim`; the gradient is all-gathered."""
    return x if group is None else _Scatter.apply(x, dim, group)  # pyright: ignore[reportReturnType]


def copy_in(x: torch.Tensor, group: Group) -> torch.Tensor:
    """x as it is; the gradient is summed over ranks."""
    return x if group is None else _Copy.apply(x, group)  # pyright: ignore[reportReturnType]


def sum_out(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over ranks; the gradient passes as it is."""
    return x if group is None else _Sum.apply(x, group)  # pyright: ignore[reportReturnType]


def exchange(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """Rows of x [n, ...] to the ranks of a group, `sent[r]` to rank r in order; `received[r]` come from rank r. The gradient goes back."""
    return x if group is None else _Exchange.apply(x, sent, received, group)  # pyright: ignore[reportReturnType]
