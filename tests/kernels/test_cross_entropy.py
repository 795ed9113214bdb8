"""The head and its loss in one: equal to the two apart, never the whole logits, the same when the vocabulary is split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from regrowth.kernels import cross_entropy
from regrowth.kernels.cross_entropy import linear_cross_entropy
from regrowth.parallel.ranks import RankPool

TOKENS, VOCABULARY, WIDTH, Z = 700, 53, 16, 1e-2


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(VOCABULARY + 1, WIDTH, generator=generator)
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator), torch.rand(TOKENS, generator=generator)


def plainly(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = functional.linear(hidden, weight).float()
    nll = functional.cross_entropy(logits, labels, reduction="none")
    return (weights * (nll + Z * torch.logsumexp(logits, -1).square())).sum(), nll


def both(run: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
    hidden, weight, labels, weights = case()
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    total, nll = run(hidden, weight, labels, weights)
    (total.sum() * 0.37).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach().reshape(()), nll.detach(), hidden.grad, weight.grad


def fused(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_cross_entropy(*arguments, z_loss=Z)


@pytest.mark.parametrize("chunk", [1, 64, 699, 700, 10_000])
def test_it_is_linear_and_cross_entropy_with_z_loss(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_tokens", lambda vocabulary: chunk)
    for got, expected in zip(both(fused), both(plainly), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def test_under_autocast_products_are_bf16_and_the_loss_is_fp32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = both(fused)
        expected = both(plainly)
    assert got[0].dtype == got[1].dtype == got[2].dtype == torch.float32
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_tokens", lambda vocabulary: 100)

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.seen = max(Largest.seen, out.numel())
            return out

    with Largest():
        both(fused)
    assert Largest.seen == TOKENS * WIDTH > 100 * (VOCABULARY + 1)
    with Largest():
        both(plainly)
    assert Largest.seen == TOKENS * (VOCABULARY + 1)


def test_without_gradients_none_are_computed() -> None:
    hidden, weight, labels, weights = case()
    weight.requires_grad_()
    with torch.no_grad():
        total, nll = fused(hidden, weight, labels, weights)
    assert not total.requires_grad
    torch.testing.assert_close(nll, plainly(*case())[1])


def on_a_slice() -> tuple[torch.Tensor, ...]:
    hidden, weight, labels, weights = case()
    part = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    total, nll = linear_cross_entropy(hidden, part, labels, weights, Z, dist.group.WORLD)
    (total.sum() * 0.37).backward()
    assert hidden.grad is not None and part.grad is not None
    return total.detach().reshape(()), nll.detach(), hidden.grad, part.grad


def test_a_vocabulary_split_over_ranks_gives_the_same_and_parts_of_the_gradients(ranks: Callable[[int], RankPool]) -> None:
    expected = both(plainly)
    results = ranks(2).run(on_a_slice)
    for total, nll, _, _ in results:
        torch.testing.assert_close(total, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(nll, expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(r[2] for r in results), expected[2], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(torch.cat([r[3] for r in results]), expected[3], rtol=2e-5, atol=2e-6)
