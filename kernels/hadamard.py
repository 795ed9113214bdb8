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
    if not x.numel():
        return x.float()
    blocks = x.float().reshape(-1, size)
    out = torch.empty_like(blocks)
    for part, to in zip(pieces(blocks), pieces(out), strict=True):
        to.copy_(_butterflies(part, size, signs))
    return out.view(x.shape)


def _butterflies(blocks: torch.Tensor, size: int, signs: torch.Tensor | None) -> torch.Tensor:
    columns = blocks.t() if signs is None else blocks.t() * signs[:, None]  # a place in all blocks together: long rows to add
    columns = columns.contiguous()
    stride = 1
    while stride < size:
        first, second = columns.view(size // (2 * stride), 2, stride, -1).unbind(1)
        columns = torch.stack((first + second, first - second), dim=1).view(size, -1)
        stride *= 2
    return columns.mul_(size**-0.5).t()


@torch.no_grad()
def inverse_hadamard(x: torch.Tensor, size: int, signs: torch.Tensor | None = None) -> torch.Tensor:
    """What `hadamard` was applied to, within rounding: the matrix is its own inverse, the signs come last."""
    plain = hadamard(x, size)
    return plain if signs is None or not x.numel() else (plain.view(-1, size) * signs).view(x.shape)


def random_signs(size: int, key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 [size] of 1 and -1, by the top bit of the key's stream."""
    from regrowth.kernels.random import random_bits

    return torch.where(random_bits(key, torch.arange(size, device=device)) < 0, -1.0, 1.0)
