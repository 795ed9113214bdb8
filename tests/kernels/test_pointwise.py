"""Gradients written out are those of the plain operators."""

import pytest
import torch
from torch.nn import functional

from regrowth.kernels.pointwise import rms_norm, rotate


def gradients(out: torch.Tensor, inputs: list[torch.Tensor], seed: int = 1) -> tuple[torch.Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return torch.autograd.grad(out, inputs, upstream)


@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 3, 4, 8), (7, 320)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_torchs_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype).requires_grad_(), torch.rand(shape[-1]).requires_grad_()
    expected = functional.rms_norm(x.float(), weight.shape, weight, 1e-6).to(dtype)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, expected, rtol=near, atol=near)
    for ours, theirs in zip(gradients(got, [x, weight]), gradients(expected, [x, weight]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


def test_the_norm_takes_rows_of_zeros_and_of_large_numbers() -> None:
    x = torch.stack((torch.zeros(8), torch.full((8,), 1e15))).requires_grad_()
    out = rms_norm(x, torch.ones(8), 1e-6)
    torch.testing.assert_close(out, torch.stack((torch.zeros(8), torch.ones(8))))
    assert torch.isfinite(gradients(out, [x])[0]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_rotation_is_a_rotation_of_pairs(transposed: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 5, 8).transpose(1, 2) if transposed else torch.randn(2, 5, 3, 8)).requires_grad_()
    angle = torch.rand(2, 5, 1, 4)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    got = rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, [x])[0], gradients(expected, [x])[0])
    assert torch.allclose(got.norm(dim=-1), x.norm(dim=-1)), "a rotation keeps lengths"
