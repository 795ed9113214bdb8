"""RMSNorm and RoPE with gradients written out: fewer passes over memory, and fewer tensors kept, than autograd's of the plain operators.

For eager CPUs, where a pass costs what it reads. On a GPU torch's own RMSNorm is one kernel, and torch.compile fuses plain operators better than
anything opaque, so there the plain operators run.
"""

from typing import Any

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dim [..., D], in fp32 and back in x's dtype (Zhang and Sennrich 2019)."""
    if _eager_cpu(x):
        return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    return functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        # With s = 1 / rms(x): dx = s g w - x s^3 mean(x g w), dw = sum of s x g over all but the last dim.
        x, weight, scale = ctx.saved_tensors
        wide, grad, gain = x.float(), grads[0].float(), weight.float()
        product = grad * wide
        rows = product.flatten(0, -2)
        grad_weight = torch.mv(rows.mT, scale.flatten())
        mean = (rows @ gain).view(scale.shape).mul_(scale.pow(3)).div_(-x.shape[-1])
        grad_x = torch.mul(grad, gain, out=product).mul_(scale).addcmul_(wide, mean)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rotate(x_BTHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE in fp32 and back in x's dtype (Su et al. 2021); the first half of `sin` [B, T, 1, d] is negated."""
    if _eager_cpu(x_BTHd):
        return _Rotate.apply(x_BTHd, cos, sin)  # pyright: ignore[reportReturnType]
    return (x_BTHd * cos + x_BTHd.roll(x_BTHd.shape[-1] // 2, dims=-1) * sin).to(x_BTHd.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1.0), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    wide, half = x.float(), x.shape[-1] // 2
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:], value=sign)
    return out.to(x.dtype)


def _eager_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
