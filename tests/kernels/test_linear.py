"""The low-precision linear computes its three GEMMs on rounded operands, each as its recipe says, and each once."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from regrowth.kernels import linear as linear_module
from regrowth.kernels.formats import E2M1
from regrowth.kernels.gemm import Cut, Site, dge_derivative
from regrowth.kernels.hadamard import hadamard, random_signs
from regrowth.kernels.linear import LowPrecisionLinear, low_precision_linear, set_precision
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.random import random_bits, random_key
from regrowth.kernels.recipe import FULL, GemmPrecision, LinearPrecision
from regrowth.pretrain.precision import load_recipe, shipped

MIXED = LinearPrecision(
    forward=GemmPrecision(Quantizer("e2m1", "row"), Quantizer("e2m1", "block", 16)),
    dgrad=GemmPrecision(Quantizer("e4m3", "tensor"), Quantizer("e5m2", "row")),
    wgrad=GemmPrecision(Quantizer("e5m2", "row"), Quantizer("e4m3", "block", 8)),
)


def layer(precision: LinearPrecision) -> tuple[LowPrecisionLinear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = LowPrecisionLinear(256, 128)
    linear.precision = precision
    linear.site = Site("layers.0.ffn.w_up", seed=3, step=5, tokens=torch.arange(128).view(2, 64) * 1000)
    return linear, torch.randn(2, 64, 256, requires_grad=True), torch.randn(2, 64, 128)


def operand(x: torch.Tensor, gemm: GemmPrecision, which: str, index: torch.Tensor) -> torch.Tensor:
    """An operand [n, contracted], transformed by the plain matrix and rounded; random bits by the index given."""
    name, side = which.split(".")
    if gemm.hadamard:
        key = random_key(3, "signs", 5, f"layers.0.ffn.w_up.0 {name}") if gemm.signs == "random" else random_key(0, "signs", 0, "")
        x = hadamard(x, gemm.hadamard, None if gemm.signs == "none" else random_signs(gemm.hadamard, key))
    quantizer: Quantizer = getattr(gemm, side)
    pairs = random_bits(random_key(3, "rounding", 5, f"layers.0.ffn.w_up.0 {which}"), index // 2)  # two neighbours share 64 bits
    return quantizer.emulate(x, random=torch.where(index % 2 == 0, pairs, pairs >> 32))


def by_hand(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, p: LinearPrecision
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, dx, dw), operand by operand, each rounded along the dim its GEMM contracts."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    token = torch.arange(len(rows))[:, None] * 1000
    of_x, of_dy = token * 256 + torch.arange(256), token * 128 + torch.arange(128)
    of_w = torch.arange(128)[:, None] * 256 + torch.arange(256)
    a, b = operand(rows, p.forward, "forward.a", of_x), operand(weight, p.forward, "forward.b", of_w)
    trust = p.estimator == "trust"
    x_back, w_back = (a, b) if trust else (rows, weight)
    dx = operand(grads, p.dgrad, "dgrad.a", of_dy) @ operand(w_back.T.contiguous(), p.dgrad, "dgrad.b", of_w.T).T
    dw = operand(grads.T.contiguous(), p.wgrad, "wgrad.a", of_dy.T) @ operand(x_back.T.contiguous(), p.wgrad, "wgrad.b", of_x.T).T
    if trust:  # 2^floor keeps what is smaller than the largest value; the transform is its own inverse
        for gradient, plain, quantizer in ((dx, rows, p.forward.a), (dw, weight, p.forward.b)):
            transformed = hadamard(plain, 32)
            scale = quantizer.scales(transformed).expand(-1, -1, 32).reshape(plain.shape)
            gradient.copy_(hadamard(gradient * (transformed.abs() < 6 * scale), 32))
    if p.estimator == "dge":
        units = weight / p.forward.b.scales(weight)
        dw = dw * torch.tensor([[stand_in_slope(v) for v in row] for row in units.tolist()])
    return a @ b.T, dx.reshape(x.shape), dw


def stand_in_slope(x: float, k: float = 5.0) -> float:
    """The slope of d/2 (1 + sign(2 t/d - 1) |2 t/d - 1|^(1/k)) between neighbours of four bits, at most 3, by its formula."""
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
    low, high = next((a, b) for a, b in itertools.pairwise(grid) if a <= abs(x) < b)
    t, d = abs(x) - low, high - low
    return min(3.0, abs(2 * t / d - 1) ** (1 / k - 1) / k) if 2 * t != d else 3.0


ENTRIES = {recipe.name: recipe.ffn for recipe in map(load_recipe, shipped()) if not recipe.is_full}


@pytest.mark.parametrize("name", ["mixed", *ENTRIES])
def test_each_gemm_follows_its_own_entry(name: str) -> None:
    precision = MIXED if name == "mixed" else ENTRIES[name]
    linear, x, grad = layer(precision)
    y = linear(x)
    y.backward(grad)
    with torch.no_grad():
        expected = by_hand(x, linear.weight, grad, precision)
    y = y.view(128, 128)
    for got, want in zip((y, x.grad, linear.weight.grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4 * want.abs().mean().item())


def test_the_stand_in_for_rounding_is_the_derivative_of_its_formula() -> None:
    """Against differences of f(t) = d/2 (1 + sign(2 t/d - 1) |2 t/d - 1|^(1/5)), away from the middle, where the slope is capped."""
    t = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.45], dtype=torch.float64)

    def smooth(t: torch.Tensor, d: float) -> torch.Tensor:
        u = 2 * t / d - 1
        return d / 2 * (1 + u.sign() * u.abs() ** 0.2)

    for low, d in ((0.0, 0.5), (1.5, 0.5), (2.0, 1.0), (4.0, 2.0)):
        at = t * d / 0.5
        slope = ((smooth(at + 1e-7, d) - smooth(at - 1e-7, d)) / 2e-7).clamp(max=3.0)
        for sign in (1, -1):
            torch.testing.assert_close(dge_derivative(sign * (low + at).float(), E2M1).double(), slope, rtol=1e-3, atol=1e-5)
    assert dge_derivative(torch.tensor([0.25, 0.75, 5.0]), E2M1).tolist() == [3.0, 3.0, 3.0], "capped in the middle"


def test_slices_of_a_linear_draw_as_the_whole() -> None:
    """Rows of the input, and of the weight: what a split over data or tensor parallel ranks would do, without the sharing of scales that blocks need not."""
    # Whole-tensor scales differ between slices, so that only rounding by chance is compared.
    chance = GemmPrecision(
        Quantizer("e4m3", "block", 32, "floor", "stochastic", 0.75), Quantizer("e4m3", "block", 32, "floor", "stochastic", 0.75)
    )
    precision = LinearPrecision(chance, replace(chance, hadamard=32, signs="random"), GemmPrecision())
    linear, x, grad = layer(precision)
    whole = linear(x)
    whole.backward(grad)
    assert x.grad is not None and linear.weight.grad is not None
    for first in (True, False):
        half = LowPrecisionLinear(256, 128)
        half.weight, half.precision = linear.weight, precision
        half.site = replace(linear.site, tokens=linear.site.tokens[:1] if first else linear.site.tokens[1:])  # type: ignore[index]
        part = (x[:1] if first else x[1:]).detach().requires_grad_()
        got = half(part)
        got.backward(grad[:1] if first else grad[1:])
        assert torch.equal(got, whole[:1] if first else whole[1:])
        assert part.grad is not None and torch.equal(part.grad, x.grad[:1] if first else x.grad[1:])
    for rank in range(2):  # half of the outputs, as of the first matrix of a pair
        part = x.detach().requires_grad_()
        cut = Cut(rank=rank, ranks=2)
        got = low_precision_linear(part, linear.weight[rank * 64 : rank * 64 + 64], precision, cut, linear.site)
        assert torch.equal(got, whole[..., rank * 64 : rank * 64 + 64])


def test_with_nothing_to_round_it_is_the_plain_linear() -> None:
    linear, x, grad = layer(LinearPrecision())
    linear(x).backward(grad)
    plain = x.detach().clone().requires_grad_()
    weight = linear.weight.detach().clone().requires_grad_()
    functional.linear(plain, weight).backward(grad)
    assert x.grad is not None and linear.weight.grad is not None
    assert torch.equal(x.grad, plain.grad) and torch.equal(linear.weight.grad, weight.grad)  # type: ignore[arg-type]


def test_the_error_of_fp4_is_of_the_size_of_its_step() -> None:
    linear, x, _ = layer(load_recipe("fp4_paper").ffn)
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
    recipe = load_recipe("fp4_paper")
    assert recipe.ffn.forward.a.format == recipe.ffn.forward.b.format == "e2m1"
    assert recipe.attention.forward.a.format == "e4m3"
    for linear in (recipe.ffn, recipe.attention):
        assert {linear.dgrad.a.format, linear.dgrad.b.format, linear.wgrad.a.format, linear.wgrad.b.format} == {"e4m3"}
    assert [recipe.at(step, 100).is_full for step in (0, 89, 90, 99)] == [False, False, True, True]
    assert FULL.is_full and FULL.at(99, 100) == FULL


def test_set_precision_reaches_every_linear_by_its_kind() -> None:
    model = torch.nn.Sequential(LowPrecisionLinear(4, 4, "attention"), torch.nn.Sequential(LowPrecisionLinear(4, 4, "ffn")))
    set_precision(model, load_recipe("fp4_paper"), layers=1)
    found = [m.precision for m in model.modules() if isinstance(m, LowPrecisionLinear)]
    assert found == [load_recipe("fp4_paper").attention, load_recipe("fp4_paper").ffn]
