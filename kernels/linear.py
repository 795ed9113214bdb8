"""A linear whose three GEMMs each follow a recipe, in emulation: operands are rounded, the product is taken in the training dtype.

The input gradient and the weight gradient live in separate autograd nodes that meet in an identity (`_Join`), so that a pipeline schedule
that asks for one of them first (zero bubble) neither computes nor rounds anything twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from regrowth.kernels.quantize import AmaxGroups
from regrowth.kernels.recipe import LinearPrecision

_WHOLE = AmaxGroups()


@dataclass(frozen=True)
class Cut:
    """How a linear is split over ranks, as far as scales are concerned: which ranks cut the dim that each of the three GEMMs contracts."""

    forward: AmaxGroups = _WHOLE
    dgrad: AmaxGroups = _WHOLE
    wgrad: AmaxGroups = _WHOLE


class LowPrecisionLinear(nn.Linear):
    """`nn.Linear` without bias whose `precision` may be changed between steps; with nothing to round it is `nn.Linear` itself."""

    def __init__(self, in_features: int, out_features: int, kind: str = "ffn") -> None:
        super().__init__(in_features, out_features, bias=False)
        self.kind = kind  # which entry of a recipe it follows
        self.precision = LinearPrecision()
        self.cut = Cut()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.precision.is_high:
            return functional.linear(input, self.weight)
        return low_precision_linear(input, self.weight, self.precision, self.cut)


def low_precision_linear(x: torch.Tensor, weight: torch.Tensor, precision: LinearPrecision, cut: Cut | None = None) -> torch.Tensor:
    """x [..., in] times weight [out, in] under a recipe's entry; differentiable in both."""
    cut = cut or Cut()
    product = _InputGemm.apply(x, weight.detach(), precision, cut)
    weight_path = _WeightGemm.apply(weight, x.detach(), precision, cut.wgrad)
    return _Join.apply(product, weight_path)


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, precision: LinearPrecision, cut: AmaxGroups | None = None) -> torch.Tensor:
    """dx [..., in] = dy w in dy's dtype; the contracted dim is out, so both operands are grouped along it."""
    a = precision.dgrad.a.emulate(grad, cut)
    b = precision.dgrad.b.emulate(weight.t().contiguous(), cut) if precision.dgrad.b.format else weight.t()
    return a.to(grad.dtype) @ b.to(grad.dtype).t()


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, precision: LinearPrecision, cut: AmaxGroups | None = None) -> torch.Tensor:
    """dw [out, in] = dy^T x in dy's dtype; the contracted dim is the tokens, so both operands are grouped along them."""
    a, b = _flat(grad).t(), _flat(x).t()
    a = precision.wgrad.a.emulate(a.contiguous(), cut) if precision.wgrad.a.format else a
    b = precision.wgrad.b.emulate(b.contiguous(), cut) if precision.wgrad.b.format else b
    return a.to(grad.dtype) @ b.to(grad.dtype).t()


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _InputGemm(torch.autograd.Function):
    """The forward product; its backward is the input gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, precision: LinearPrecision, cut: Cut) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.precision, ctx.cut = precision, cut.dgrad
        dtype = _product_dtype(x)
        return precision.forward.a.emulate(x, cut.forward).to(dtype) @ precision.forward.b.emulate(weight, cut.forward).to(dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        return input_gradient(grads[0], weight, ctx.precision, ctx.cut), None, None, None  # autograd casts to x's dtype


class _WeightGemm(torch.autograd.Function):
    """No product forward, only a place for the gradient to arrive; its backward is the weight gradient alone."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor, precision: LinearPrecision, cut: AmaxGroups) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.precision, ctx.cut = precision, cut
        return weight.new_zeros((), dtype=_product_dtype(x)).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return weight_gradient(grads[0], x, ctx.precision, ctx.cut), None, None, None


class _Join(torch.autograd.Function):
    """The product as it is; the gradient goes both ways."""

    @staticmethod
    def forward(ctx: Any, product: torch.Tensor, weight_path: torch.Tensor) -> torch.Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], grads[0]  # autograd casts each to its path's dtype


def set_precision(model: nn.Module, attention: LinearPrecision, ffn: LinearPrecision) -> None:
    """Tell every low-precision linear of a model what to compute in from now on."""
    for module in model.modules():
        if isinstance(getattr(module, "precision", None), LinearPrecision):  # linears, and stacked experts
            linear: Any = module
            linear.precision = ffn if linear.kind == "ffn" else attention
