"""A linear whose three GEMMs each follow a recipe, in emulation: operands are rounded, the product is taken in the training dtype.

The input gradient and the weight gradient live in separate autograd nodes that meet in an identity (`_Join`), so that a pipeline schedule
that asks for one of them first (zero bubble) neither computes nor rounds anything twice.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from regrowth.kernels.formats import FORMATS
from regrowth.kernels.gemm import Call, Cut, Rounded, Site, dge_derivative
from regrowth.kernels.recipe import HIGH, LinearPrecision, PrecisionRecipe


class LowPrecisionLinear(nn.Linear):
    """`nn.Linear` without bias whose `precision` may be changed between steps; with nothing to round it is `nn.Linear` itself."""

    def __init__(self, in_features: int, out_features: int, kind: str = "ffn") -> None:
        super().__init__(in_features, out_features, bias=False)
        self.kind = kind  # which entry of a recipe it follows
        self.precision = HIGH
        self.cut = Cut()
        self.site = Site()
        self.weight_amax: torch.Tensor | None = None  # fp32 scalar, the largest magnitude of the whole weight where that is known
        self.hardware = False  # products that the device's matrix units take are theirs (`hardware.py`)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.precision.is_high:
            return functional.linear(input, self.weight)
        return low_precision_linear(input, self.weight, self.precision, self.cut, self.site, self.hardware, self.weight_amax)


def low_precision_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    precision: LinearPrecision,
    cut: Cut | None = None,
    site: Site | None = None,
    hardware: bool = False,
    weight_amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in] times weight [out, in] under a recipe's entry; differentiable in both."""
    if site is None or not (precision.draws or site.remembers):
        return _apply(x, weight, Call(precision, cut or Cut(), hardware=hardware, weight_amax=weight_amax))
    # What is drawn is another at every step, and what is remembered is every linear's own: compiled into a block, they would have each block compiled at every step.
    return _apply_as_it_is(x, weight, Call(precision, cut or Cut(), site.now(), torch.is_grad_enabled(), hardware, weight_amax))


def _apply(x: torch.Tensor, weight: torch.Tensor, call: Call) -> torch.Tensor:
    trust = call.precision.estimator == "trust"
    with torch.no_grad():
        a = call.operand("forward", "a", x, "x", _product_dtype(x), mask=trust)
        b = call.operand("forward", "b", weight, "w", _product_dtype(x), mask=trust)
    product = _InputGemm.apply(x, weight.detach(), a, b, call)
    weight_path = _WeightGemm.apply(weight, x.detach(), a, b, call)
    return _Join.apply(product, weight_path)


_apply_as_it_is: Any = torch.compiler.disable(_apply)


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, call: Call) -> torch.Tensor:
    """dx [..., in] = dy w in dy's dtype; the contracted dim is out, so both operands are grouped along it."""
    a = call.operand("dgrad", "a", grad, "dy", grad.dtype)
    b = call.operand("dgrad", "b", weight.t(), "w", grad.dtype, transposed=True)
    return call.product(a, b, grad.dtype)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, call: Call) -> torch.Tensor:
    """dw [out, in] = dy^T x in dy's dtype; the contracted dim is the tokens, so both operands are grouped along them."""
    a = call.operand("wgrad", "a", _flat(grad).t(), "dy", grad.dtype, transposed=True)
    b = call.operand("wgrad", "b", _flat(x).t(), "x", grad.dtype, transposed=True)
    return call.product(a, b, grad.dtype)


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _InputGemm(torch.autograd.Function):
    """The forward product; its backward is the input gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: Rounded, b: Rounded, call: Call) -> torch.Tensor:
        ctx.call, dtype = call, _product_dtype(x)
        if a.kept is None:
            ctx.save_for_backward(weight)
        else:
            ctx.save_for_backward(b.value, a.kept)
        return call.product(a, b, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        gradient = input_gradient(grads[0], weight, ctx.call)  # autograd casts to x's dtype
        if kept:
            gradient = ctx.call.untransform("forward", gradient * kept[0])
        return gradient, None, None, None, None


class _WeightGemm(torch.autograd.Function):
    """No product forward, only a place for the gradient to arrive; its backward is the weight gradient alone."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor, a: Rounded, b: Rounded, call: Call) -> torch.Tensor:
        ctx.call = call
        if b.kept is not None:
            ctx.save_for_backward(a.value, b.kept)
        elif call.precision.estimator == "dge":
            ctx.save_for_backward(x, weight)
        else:
            ctx.save_for_backward(x)
        return weight.new_zeros((), dtype=_product_dtype(x)).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        call: Call = ctx.call
        gradient = weight_gradient(grads[0], x, call)
        if call.precision.estimator == "trust":
            gradient = call.untransform("forward", gradient * rest[0])
        elif call.precision.estimator == "dge":
            quantizer = call.precision.forward.b
            assert quantizer.format is not None
            scale = quantizer.scales(rest[0].float(), call.cut.forward)
            gradient = gradient * dge_derivative(quantizer.in_units_of(scale, rest[0].float()), FORMATS[quantizer.format])
        return gradient, None, None, None, None


class _Join(torch.autograd.Function):
    """The product as it is; the gradient goes both ways."""

    @staticmethod
    def forward(ctx: Any, product: torch.Tensor, weight_path: torch.Tensor) -> torch.Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], grads[0]  # autograd casts each to its path's dtype


def low_precision_modules(model: nn.Module) -> dict[str, Any]:
    """The linears that follow recipes, and stacked experts, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(getattr(module, "precision", None), LinearPrecision)}


def set_precision(model: nn.Module, recipe: PrecisionRecipe, layers: int, seed: int = 0, step: int = 0) -> None:
    """Tell every low-precision linear of a model, or of a stage of it, what to compute in from now on, and what its draws depend on.

    Args:
        layers: of the whole model.
    """
    for name, module in low_precision_modules(model).items():
        module.precision = recipe.of(name, module.kind, layers)
        module.site.name, module.site.seed, module.site.step = name, seed, step
