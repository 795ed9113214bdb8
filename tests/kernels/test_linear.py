"""The low-precision linear computes its three GEMMs on rounded operands, each as its recipe says, and each once."""

import pytest
import torch
from torch.nn import functional

from regrowth.kernels import linear as linear_module
from regrowth.kernels.linear import LowPrecisionLinear, set_precision
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.recipe import FULL, RECIPES, GemmPrecision, LinearPrecision

MIXED = LinearPrecision(
    forward=GemmPrecision(Quantizer("e2m1", "row"), Quantizer("e2m1", "block", 16)),
    dgrad=GemmPrecision(Quantizer("e4m3", "tensor"), Quantizer("e5m2", "row")),
    wgrad=GemmPrecision(Quantizer("e5m2", "row"), Quantizer("e4m3", "block", 8)),
)


def layer(precision: LinearPrecision) -> tuple[LowPrecisionLinear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = LowPrecisionLinear(32, 16)
    linear.precision = precision
    return linear, torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 4, 16)


def by_hand(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, p: LinearPrecision
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, dx, dw), operand by operand, each rounded along the dim its GEMM contracts."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    y = p.forward.a.emulate(x) @ p.forward.b.emulate(weight).T
    dx = (p.dgrad.a.emulate(grads) @ p.dgrad.b.emulate(weight.T.contiguous()).T).reshape(x.shape)
    dw = p.wgrad.a.emulate(grads.T.contiguous()) @ p.wgrad.b.emulate(rows.T.contiguous()).T
    return y, dx, dw


@pytest.mark.parametrize("precision", [MIXED, *(r.ffn for r in RECIPES.values() if not r.is_full and "block" not in r.name)])
def test_each_gemm_follows_its_own_entry(precision: LinearPrecision) -> None:
    linear, x, grad = layer(precision)
    y = linear(x)
    y.backward(grad)
    with torch.no_grad():
        expected = by_hand(x, linear.weight, grad, precision)
    for got, want in zip((y, x.grad, linear.weight.grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_with_nothing_to_round_it_is_the_plain_linear() -> None:
    linear, x, grad = layer(LinearPrecision())
    linear(x).backward(grad)
    plain = x.detach().clone().requires_grad_()
    weight = linear.weight.detach().clone().requires_grad_()
    functional.linear(plain, weight).backward(grad)
    assert x.grad is not None and linear.weight.grad is not None
    assert torch.equal(x.grad, plain.grad) and torch.equal(linear.weight.grad, weight.grad)  # type: ignore[arg-type]


def test_the_error_of_fp4_is_of_the_size_of_its_step() -> None:
    linear, x, _ = layer(RECIPES["fp4_paper"].ffn)
    exact = functional.linear(x, linear.weight)
    error = ((linear(x) - exact).norm() / exact.norm()).item()
    assert 0.02 < error < 0.25


def test_asking_for_one_gradient_first_neither_computes_nor_rounds_anything_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a zero-bubble schedule does: the input's gradient now, the weight's later."""
    calls: list[str] = []
    for name in ("input_gradient", "weight_gradient"):
        real = getattr(linear_module, name)
        monkeypatch.setattr(linear_module, name, lambda *a, _real=real, _name=name: calls.append(_name) or _real(*a))
    linear, x, grad = layer(MIXED)
    y = linear(x)
    (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    assert calls == ["input_gradient"]
    (dw,) = torch.autograd.grad(y, linear.weight, grad)
    assert calls == ["input_gradient", "weight_gradient"]
    monkeypatch.undo()
    linear, x, _ = layer(MIXED)
    linear(x).backward(grad)
    assert torch.equal(dx, x.grad) and torch.equal(dw, linear.weight.grad)  # type: ignore[arg-type]


def test_bf16_autocast_computes_in_bf16_and_keeps_gradients_in_the_parameters_dtype() -> None:
    linear, x, grad = layer(MIXED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32
    with torch.no_grad():
        _, _, dw = by_hand(x, linear.weight, grad, MIXED)
    assert (linear.weight.grad - dw).norm() / dw.norm() < 0.02


def test_the_fp4_papers_recipe_and_its_schedule() -> None:
    recipe = RECIPES["fp4_paper"]
    assert recipe.ffn.forward.a.format == recipe.ffn.forward.b.format == "e2m1"
    assert recipe.attention.forward.a.format == "e4m3"
    for linear in (recipe.ffn, recipe.attention):
        assert {linear.dgrad.a.format, linear.dgrad.b.format, linear.wgrad.a.format, linear.wgrad.b.format} == {"e4m3"}
    assert [recipe.at(step, 100).is_full for step in (0, 89, 90, 99)] == [False, False, True, True]
    assert FULL.is_full and FULL.at(99, 100) == FULL


def test_set_precision_reaches_every_linear_by_its_kind() -> None:
    model = torch.nn.Sequential(LowPrecisionLinear(4, 4, "attention"), torch.nn.Sequential(LowPrecisionLinear(4, 4, "ffn")))
    set_precision(model, RECIPES["fp4_paper"].attention, RECIPES["fp4_paper"].ffn)
    found = [m.precision for m in model.modules() if isinstance(m, LowPrecisionLinear)]
    assert found == [RECIPES["fp4_paper"].attention, RECIPES["fp4_paper"].ffn]
