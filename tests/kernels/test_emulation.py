"""Emulation by the Triton kernels: linears compute what they compute by the reference, bit for bit; and the kernels are used only where that is so, with gain."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from regrowth.kernels import emulation
from regrowth.kernels.gemm import Cut, Site
from regrowth.kernels.linear import low_precision_linear
from regrowth.kernels.quantize import AmaxGroups, Quantizer
from regrowth.kernels.recipe import LinearPrecision
from regrowth.pretrain.precision import load_recipe, shipped

pytest.importorskip("triton", reason="the extra gpu is not installed")

Results = tuple[torch.Tensor, ...]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LINEARS = {name: load_recipe(name).ffn for name in shipped() if name != "bf16"} | {
    "fp4_paper, attention": load_recipe("fp4_paper").attention
}


def passes(precision: LinearPrecision, dtype: torch.dtype, cut: Cut | None = None) -> Results:
    """Output and both gradients of a linear 128 -> 256 on 2 x 128 tokens, some of them elsewhere in their batch."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 128, 128, generator=generator).mul_(torch.rand(2, 128, 1, generator=generator) * 9).to(DEVICE).requires_grad_()
    weight = (torch.randn(256, 128, generator=generator) / 8).to(DEVICE).requires_grad_()
    gradient = torch.randn(2, 128, 256, generator=generator).to(DEVICE, dtype)
    site = Site("layers.1.ffn.w_up", seed=5, step=7, tokens=torch.arange(40, 296, device=DEVICE).view(2, 128))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = low_precision_linear(x, weight, precision, cut, site)
    return y, *torch.autograd.grad(y, (x, weight), gradient)


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_computes_the_same_by_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole one in fp32, and a slice in bf16."""
    precision, used = LINEARS[name], list[Quantizer]()

    def both() -> Results:
        return *passes(precision, torch.float32), *passes(precision, torch.bfloat16, Cut(rank=1, ranks=2))

    monkeypatch.setattr(emulation, "_are_there", lambda device: False)
    by_reference, emulate = both(), emulation.emulate
    monkeypatch.setattr(emulation, "_are_there", lambda device: True)
    monkeypatch.setattr(emulation, "_gains", lambda *of: True)
    monkeypatch.setattr(emulation, "emulate", lambda x, quantizer, *rest: used.append(quantizer) or emulate(x, quantizer, *rest))
    for ours, theirs in zip(both(), by_reference, strict=True):
        assert torch.equal(ours, theirs)
    operands = [q for gemm in (precision.forward, precision.dgrad, precision.wgrad) for q in (gemm.a, gemm.b) if q.format]
    left_out = sum(q.outliers is not None or q.scale == "delayed" for q in operands) + 2 * (precision.estimator == "trust")
    assert len(used) == 2 * (len(operands) - left_out)


def test_the_kernels_are_used_only_where_they_give_the_reference_s_bits_sooner(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quantizer = Quantizer("e2m1", "block", 16, "two_level", "stochastic")
    x, seconds = torch.ones(4, 32, device=DEVICE), {"reference": 1.0, "kernels": 0.5}

    def takes(x: torch.Tensor, quantizer: Quantizer, groups: AmaxGroups = AmaxGroups(), transposed: bool = False) -> bool:  # noqa: B008
        return emulation.takes(x, quantizer, 16, groups, transposed, torch.bfloat16)

    def tried() -> bool:
        emulation._gains.cache_clear()
        return takes(x, quantizer)

    def timed(run: Callable[[], torch.Tensor], device: torch.device) -> float:
        return seconds[run.__name__]

    assert not takes(x.cpu(), quantizer), "there is no GPU that they could run on"
    monkeypatch.setattr(emulation, "_are_there", lambda device: True)
    monkeypatch.setattr(emulation, "_seconds", timed)
    monkeypatch.setattr(emulation, "_SHAPE", (32, 64))
    assert tried() and takes(x, quantizer, transposed=True)
    group: Any = object()
    assert not takes(x, quantizer, AmaxGroups(row=group)) and not takes(x, quantizer, AmaxGroups(tensor=group)), "ranks might not agree"
    assert not takes(x, Quantizer("e4m3", "tensor", scale="delayed")) and not takes(x, Quantizer())
    assert not takes(x[:0], quantizer) and not takes(x[:, :5], quantizer)
    seconds["kernels"] = 2.0
    assert not tried(), "slower"
    seconds["kernels"], emulate = 0.5, emulation.emulate
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(emulation, "emulate", lambda *given: emulate(*given).mul_(1.5))
        assert not tried() and "round otherwise than the reference here" in caplog.text
        monkeypatch.setattr(emulation, "emulate", lambda *given: torch.ops.aten.nothing_of_the_kind)
        assert not tried() and "do not run here, and are not used: AttributeError" in caplog.text
    emulation._gains.cache_clear()
