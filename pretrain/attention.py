"""The attention core under the document mask: a query sees the keys of its own document at its own or an earlier position.

`Sdpa` builds the mask densely ([B, 1, T, T] of booleans) and is right everywhere; `Flex` hands the same rule to FlexAttention, which
compiled on a GPU skips blocks that are masked out whole and keeps no T x T tensor. Because the rule compares (document, position) and never
an index, the order of tokens does not matter: what context parallelism deals out, in whatever order, is masked alike.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from regrowth.errors import UserError

Mask = Any  # whatever the core's `mask` made


class Attend(Protocol):
    """An attention core: makes its mask once for all layers, then attends in each."""

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> Mask: ...

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Mask) -> torch.Tensor: ...


def visible(q_docs_BT: torch.Tensor, q_positions_BT: torch.Tensor, k_docs_BT: torch.Tensor, k_positions_BT: torch.Tensor) -> torch.Tensor:
    """The rule, densely: bool [B, Tq, Tk]."""
    same = q_docs_BT[:, :, None] == k_docs_BT[:, None, :]
    return same & (q_positions_BT[:, :, None] >= k_positions_BT[:, None, :])


class Sdpa:
    """scaled_dot_product_attention with a dense mask; on a CPU in bands of queries, each against the keys that any of them sees.

    torch's kernel for CPUs computes masked scores too. Bands leave out what lies behind every query of a band and what belongs to documents
    that ended before it: for causal masks alone five eighths of the work remain.
    """

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> "torch.Tensor | list[Band]":
        """bool [B, 1, T, T]; on a CPU the bands."""
        seen_BTS = visible(doc_ids_BT, positions_BT, doc_ids_BT, positions_BT)
        return bands(seen_BTS) if doc_ids_BT.device.type == "cpu" else seen_BTS[:, None]

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Mask) -> torch.Tensor:
        """[B, H, T, d]; k and v may have fewer heads."""
        if isinstance(mask, torch.Tensor):
            grouped = q_BHTd.shape[1] != k_BHTd.shape[1]
            return functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=mask, enable_gqa=grouped)
        return _BandedAttention.apply(q_BHTd, k_BHTd, v_BHTd, mask)  # pyright: ignore[reportReturnType]


class Band(NamedTuple):
    """Queries `begin` to `end`, which see keys between `first` and `last`; where among them, `bias` [B, 1, end - begin, last - first] says with
    0 and -inf."""

    begin: int
    end: int
    first: int
    last: int
    bias: torch.Tensor


def bands(seen_BTS: torch.Tensor, queries: int = 64) -> list[Band]:
    """Bands of a mask bool [B, T, S] in which every query sees a key."""
    anyone_TS, found = seen_BTS.any(0), []
    for begin in range(0, seen_BTS.shape[1], queries):
        end = min(begin + queries, seen_BTS.shape[1])
        keys = torch.nonzero(anyone_TS[begin:end].any(0))
        first, last = int(keys[0]), int(keys[-1]) + 1
        part = seen_BTS[:, None, begin:end, first:last]
        found.append(Band(begin, end, first, last, torch.zeros(part.shape).masked_fill_(~part, -torch.inf)))
    return found


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: list[Band]) -> torch.Tensor:
        wide_k, wide_v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        done = [
            _flash(q[:, :, b.begin : b.end], wide_k[:, :, b.first : b.last], wide_v[:, :, b.first : b.last], attn_mask=b.bias.to(q.dtype))
            for b in mask
        ]
        # Laid out as [B, T, H, d], in which the projections around this read and write it: then no head is copied.
        out = torch.cat([part.transpose(1, 2) for part, _ in done], dim=1).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, *(sums for _, sums in done))
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *sums = ctx.saved_tensors
        wide_k, wide_v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        grad_q = q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
        grad_k = grad_v = None
        for band, log_sums in reversed(list(zip(ctx.mask, sums, strict=True))):
            rows, keys = slice(band.begin, band.end), slice(band.first, band.last)
            grad_q[:, :, rows], to_k, to_v = _flash_backward(
                grads[0][:, :, rows], q[:, :, rows], wide_k[:, :, keys], wide_v[:, :, keys], out[:, :, rows], log_sums, 0.0, False,
                attn_mask=band.bias.to(q.dtype),
            )  # fmt: skip
            if grad_k is None or grad_v is None:  # the last band mostly sees all keys, and then its gradients are what the others add to
                around = (0, 0, band.first, k.shape[2] - band.last)
                grad_k, grad_v = (functional.pad(x, around) if any(around) else x for x in (to_k, to_v))
            else:
                grad_k[:, :, keys] += to_k
                grad_v[:, :, keys] += to_v
        assert grad_k is not None and grad_v is not None
        if wide_k is not k:  # query heads of one group share a key head
            grad_k, grad_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None


def _repeated(x_BHTd: torch.Tensor, heads: int) -> torch.Tensor:
    return x_BHTd if x_BHTd.shape[1] == heads else x_BHTd.repeat_interleave(heads // x_BHTd.shape[1], dim=1)


class Flex:
    """FlexAttention with a block mask; compiled on a GPU, eager (and slow) elsewhere."""

    _compiled: Any = None

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> Mask:
        """A BlockMask."""
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (doc_ids_BT[b, q] == doc_ids_BT[b, k]) & (positions_BT[b, q] >= positions_BT[b, k])

        batch, time = doc_ids_BT.shape
        return create_block_mask(rule, batch, None, time, time, device=str(doc_ids_BT.device))

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Mask) -> torch.Tensor:
        """[B, H, T, d]; k and v may have fewer heads."""
        from torch.nn.attention.flex_attention import flex_attention

        if q_BHTd.is_cuda and Flex._compiled is None:
            Flex._compiled = torch.compile(flex_attention, dynamic=False)
        call = Flex._compiled if q_BHTd.is_cuda else flex_attention
        return call(q_BHTd, k_BHTd, v_BHTd, block_mask=mask, enable_gqa=q_BHTd.shape[1] != k_BHTd.shape[1])


class Documents(NamedTuple):
    """Where documents begin in sequences laid end to end, int32 [documents + 1], and a bound on the longest."""

    starts: torch.Tensor
    longest: int


class Varlen:
    """Documents as sequences of variable length, causal each for itself: no mask and no masked work. On a GPU one flash kernel (half precision only); on a
    CPU document by document.

    Needs each document's tokens in their order, which context parallelism does not keep.
    """

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> Documents:
        """The same as `Batch.boundaries`, on the device."""
        begins = torch.ones_like(doc_ids_BT, dtype=torch.bool)
        begins[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
        starts = functional.pad(torch.nonzero(begins.flatten()).flatten(), (0, 1), value=begins.numel())
        return Documents(starts.to(torch.int32), doc_ids_BT.shape[1])

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Documents) -> torch.Tensor:
        """[B, H, T, d]; k and v may have fewer heads."""
        batch, heads, time, _ = q_BHTd.shape
        q, k, v = (_repeated(x, heads).transpose(1, 2).flatten(0, 1) for x in (q_BHTd, k_BHTd, v_BHTd))  # [B T, H, d]
        if q.is_cuda:
            from torch.nn.attention.varlen import varlen_attn

            out = varlen_attn(q, k, v, mask.starts, mask.starts, mask.longest, mask.longest, window_size=(-1, 0))
            assert isinstance(out, torch.Tensor)
        else:
            sizes = mask.starts.diff().tolist()
            parts = zip(*(x.transpose(0, 1).split(sizes, dim=1) for x in (q, k, v)), strict=True)
            out = torch.cat([functional.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=1).transpose(0, 1)
        return out.unflatten(0, (batch, time)).transpose(1, 2)


ATTENTION: dict[str, type[Sdpa] | type[Flex] | type[Varlen]] = {"sdpa": Sdpa, "flex": Flex, "varlen": Varlen}


def choose_attention(name: str, device: torch.device) -> Attend:
    """`auto` is flex on GPUs and sdpa elsewhere.

    Raises:
        UserError: flex was asked for on a CPU, where torch has no backward pass for it.
    """
    if name == "flex" and device.type == "cpu":
        raise UserError('run.attention = "flex" trains on GPUs only; use "auto" or "sdpa" on a CPU.')
    if name == "auto":
        name = "flex" if device.type == "cuda" else "sdpa"
    return ATTENTION[name]()
