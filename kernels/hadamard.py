"""Hadamard transforms in blocks along the last dim: they spread an outlier over its block, and a product of two operands transformed alike along what it contracts is
the product of the plain ones."""

import torch

from regrowth.kernels.formats import pieces

SIZES = (16, 32, 64, 128)


@torch.no_grad()
def hadamard(x: torch.Tensor, size: int, signs: torch.Tensor | None = None) -> torch.Tensor:
    """Each block of `size` of the last dim, times `signs`, times the orthogonal Hadamard matrix of Sylvester's order; fp32 of x's shape.

    By butterflies in fp32, strides 1, 2, 4 and so on, and one product with 1 / sqrt(size) at the end: every implementation that keeps this order gives the same bits.

    Args:
        signs: fp32 [size] of 1 and -1.

    Raises:
        ValueError: `size` is no size of a transform, or does not divide the last dim.
    """
    if size not in SIZES or x.shape[-1] % size:
        raise ValueError(f"a Hadamard transform of {size} does not fit a dim of {x.shape[-1]}; sizes are {', '.join(map(str, SIZES))}")
    x = x.float()
    if not x.numel():
        return x
    if x.dim() == 2 and x.t().is_contiguous():  # the transpose of what is in memory: the places of a block are rows there
        out = torch.empty_like(x)
        for part, to in pieces(x.t().view(-1, size, len(x)), out.t().view(-1, size, len(x)), whole=1):
            _butterflies(part, signs, to)
        return out
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part, to in pieces(x.reshape(-1, size), out.view(-1, size), whole=1):
        columns = part.t().contiguous()[None]  # a place in all blocks together: long rows to add
        to.copy_(_butterflies(columns, signs, columns)[0].t())
    return out


def _butterflies(rows: torch.Tensor, signs: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Of [groups, size, n] along the second dim, into `out`, which may be the same."""
    size = rows.shape[1]
    here, there = (rows if signs is None else rows * signs[:, None]), torch.empty_like(rows)
    stride = 1
    while stride < size:
        halves = (t.view(len(t), size // (2 * stride), 2, stride, -1).unbind(2) for t in (here, there))
        (first, second), (sums, differences) = halves
        torch.add(first, second, out=sums)
        torch.sub(first, second, out=differences)
        here, there = there, (torch.empty_like(rows) if here is rows else here)
        stride *= 2
    return torch.mul(here, size**-0.5, out=out)


@torch.no_grad()
def inverse_hadamard(x: torch.Tensor, size: int, signs: torch.Tensor | None = None) -> torch.Tensor:
    """What `hadamard` was applied to, within rounding: the matrix is its own inverse, the signs come last."""
    plain = hadamard(x, size)
    return plain if signs is None or not x.numel() else (plain.view(-1, size) * signs).view(x.shape)


def random_signs(size: int, key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 [size] of 1 and -1, by the top bit of the key's stream."""
    from regrowth.kernels.random import random_bits

    return torch.where(random_bits(key, torch.arange(size, device=device)) < 0, -1.0, 1.0)
