"""Products by matrix units: those that they take, and the same numbers as in emulation. A CPU has the operator, without the speed; on a GPU the real ones are met."""

import pytest
import torch

from regrowth.kernels import hardware
from regrowth.kernels.linear import LowPrecisionLinear
from regrowth.pretrain.precision import load_recipe, shipped

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not hardware.lacks(torch.device("cuda")) else "cpu")
TAKEN = ("fp8_tensorwise", "fp8_rowwise", "fp8_delayed")


def test_which_recipes_matrix_units_take() -> None:
    taken = {
        name: [hardware.takes(gemm) for gemm in (r.ffn.forward, r.ffn.dgrad, r.ffn.wgrad)]
        for name in shipped()
        for r in [load_recipe(name)]
    }
    assert all(taken[name] == [True] * 3 for name in TAKEN)
    assert taken.pop("fp4_paper") == [False, True, True], "the backward products of the FP4 paper"
    assert all(its == [False] * 3 for name, its in taken.items() if name not in TAKEN)
    rowwise = load_recipe("fp8_rowwise").ffn
    assert (
        hardware.takes_linear(rowwise, 64, 32, 128)
        and not hardware.takes_linear(rowwise, 64, 24, 128)
        and not hardware.takes_linear(rowwise, 64, 32, 1000)
    )
    assert not hardware.takes_linear(load_recipe("fp4_paper").ffn, 64, 32, 128), "four bits forward: emulated as a whole"
    assert "has no matrix units for eight bits" in hardware.lacks(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", [*TAKEN, "fp4_paper"])
def test_they_give_what_emulation_gives_within_the_order_of_sums(recipe: str, dtype: torch.dtype) -> None:
    if DEVICE.type == "cuda" and dtype == torch.float32 and recipe in ("fp8_rowwise", "fp4_paper"):
        pytest.skip("scales per row come out in bf16 alone there")
    torch.manual_seed(0)
    linear = LowPrecisionLinear(64, 48).to(DEVICE, dtype)
    linear.precision = load_recipe(recipe).ffn
    x, gradient = torch.randn(2, 16, 64, device=DEVICE, dtype=dtype), torch.randn(2, 16, 48, device=DEVICE, dtype=dtype)
    found = []
    for linear.hardware in (False, True):
        linear.zero_grad()
        at = x.clone().requires_grad_()
        y = linear(at)
        y.backward(gradient)
        assert at.grad is not None and linear.weight.grad is not None
        found.append([y.detach(), at.grad, linear.weight.grad.clone()])
    for emulated, real in zip(*found, strict=True):
        # Emulation in bf16 rounds operands once more, to bf16, where fp8 times its scale has more bits.
        torch.testing.assert_close(real, emulated, rtol=0, atol=(2e-6 if dtype == torch.float32 else 2e-2) * emulated.abs().max().item())


def test_a_linear_without_tokens_passes() -> None:
    linear = LowPrecisionLinear(32, 16).to(DEVICE)
    linear.precision, linear.hardware = load_recipe("fp8_rowwise").ffn, True
    linear(torch.zeros(0, 32, device=DEVICE)).sum().backward()
    assert linear.weight.grad is not None and not linear.weight.grad.any()


def test_the_gain_is_a_ratio_of_times_of_this_device() -> None:
    assert 0 < hardware.gain(64, 64, 64, load_recipe("fp8_rowwise").ffn, DEVICE, repeats=3) < 100
