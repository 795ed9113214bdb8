"""The attention core under the document mask: a query sees the keys of its own document at its own or an earlier position.

`Sdpa` builds the mask densely ([B, 1, T, T] of booleans) and is right everywhere; `Flex` hands the same rule to FlexAttention, which
compiled on a GPU skips blocks that are masked out whole and keeps no T x T tensor. Because the rule compares (document, position) and never
an index, the order of tokens does not matter: what context parallelism deals out, in whatever order, is masked alike.
"""

from typing import Any, Protocol

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
    """scaled_dot_product_attention with a dense mask."""

    def mask(self, doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """bool [B, 1, T, T]."""
        return visible(doc_ids_BT, positions_BT, doc_ids_BT, positions_BT)[:, None]

    def __call__(self, q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Mask) -> torch.Tensor:
        """[B, H, T, d]; k and v may have fewer heads."""
        grouped = q_BHTd.shape[1] != k_BHTd.shape[1]
        return functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=mask, enable_gqa=grouped)


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


ATTENTION: dict[str, type[Sdpa] | type[Flex]] = {"sdpa": Sdpa, "flex": Flex}


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
