"""The attention core under the document mask: a query sees the keys of its own document at its own or an earlier position.

`sdpa` builds the mask densely ([B, 1, T, T] of booleans) and is right everywhere; `flex` hands the same rule to FlexAttention, which
compiled on a GPU skips blocks that are masked out whole and keeps no T x T tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from regrowth.errors import UserError

Mask = Any  # a boolean tensor for sdpa, a BlockMask for flex
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask], torch.Tensor]


def sdpa(q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Mask) -> torch.Tensor:
    """scaled_dot_product_attention with a dense mask."""
    grouped = q_BHTd.shape[1] != k_BHTd.shape[1]
    return functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=mask, enable_gqa=grouped)


def flex(q_BHTd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor, mask: Mask) -> torch.Tensor:
    """FlexAttention with a block mask; compiled on a GPU, eager (and slow) elsewhere."""
    from torch.nn.attention.flex_attention import flex_attention

    call = _compiled(flex_attention) if q_BHTd.is_cuda else flex_attention
    return call(q_BHTd, k_BHTd, v_BHTd, block_mask=mask, enable_gqa=q_BHTd.shape[1] != k_BHTd.shape[1])


_CACHE: dict[Any, Any] = {}


def _compiled(function: Any) -> Any:
    if function not in _CACHE:
        _CACHE[function] = torch.compile(function, dynamic=False)
    return _CACHE[function]


ATTENTION: dict[str, Attend] = {"sdpa": sdpa, "flex": flex}


def choose_attention(name: str, device: torch.device) -> Attend:
    """`auto` is flex on GPUs and sdpa elsewhere.

    Raises:
        UserError: flex was asked for on a CPU, where torch has no backward pass for it.
    """
    if name == "flex" and device.type == "cpu":
        raise UserError('run.attention = "flex" trains on GPUs only; use "auto" or "sdpa" on a CPU.')
    return ATTENTION["flex" if device.type == "cuda" else "sdpa"] if name == "auto" else ATTENTION[name]


def document_mask(doc_ids_BT: torch.Tensor, positions_BT: torch.Tensor, attend: Attend) -> Mask:
    """The rule as the chosen core wants it."""
    if attend is not flex:
        same = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
        earlier = positions_BT[:, :, None] >= positions_BT[:, None, :]
        return (same & earlier)[:, None]
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (doc_ids_BT[b, q] == doc_ids_BT[b, k]) & (positions_BT[b, q] >= positions_BT[b, k])

    batch, time = doc_ids_BT.shape
    return create_block_mask(visible, batch, None, time, time, device=str(doc_ids_BT.device))
