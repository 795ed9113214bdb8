"""A decoder-only Transformer whose parameter names are the canonical ones.

    embed.weight   layers.{i}.attn_norm.weight   layers.{i}.attn.{wq,wk,wv,wo}.weight   layers.{i}.attn.{q,k}_norm.weight
    layers.{i}.ffn_norm.weight   layers.{i}.ffn.{w_gate,w_up,w_down}.weight   norm.weight   head.weight (absent when tied)

Layers are keyed by their global index, so that a pipeline stage's names are the whole model's. RoPE takes explicit positions and the mask
compares (document, position): packing, padding and context parallelism agree. Shapes: B batch, T time, D width, H heads, d head dim, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from regrowth.kernels.linear import LowPrecisionLinear
from regrowth.pretrain.attention import Attend, Mask, document_mask
from regrowth.pretrain.model_config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dim."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_table(positions_BT: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin [B, T, 1, d] of rotate-half RoPE at explicit positions (Su et al. 2021); the first half of sin is negated."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
    angles_BT1d = (positions_BT.float()[..., None] * (1.0 / theta**exponents))[:, :, None]
    cos, sin = angles_BT1d.cos(), angles_BT1d.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x_BTHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotate-half RoPE; rolling by half swaps the halves in one pass."""
    return (x_BTHd * cos + x_BTHd.roll(x_BTHd.shape[-1] // 2, dims=-1) * sin).to(x_BTHd.dtype)


class Attention(nn.Module):
    """Grouped-query attention with optional qk-norm; the core is handed in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.wq = LowPrecisionLinear(config.width, queries, kind="attention")
        self.wk = LowPrecisionLinear(config.width, keys, kind="attention")
        self.wv = LowPrecisionLinear(config.width, keys, kind="attention")
        self.wo = LowPrecisionLinear(queries, config.width, kind="attention")
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Mask, attend: Attend) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, time, _ = x_BTD.shape
        q_BTHd, k_BTHd, v_BTHd = (w(x_BTD).view(batch, time, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHd, k_BTHd = self.q_norm(q_BTHd), self.k_norm(k_BTHd)
        q_BTHd, k_BTHd = rotate(q_BTHd, cos, sin), rotate(k_BTHd, cos, sin)
        out_BHTd = attend(q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHd.transpose(1, 2), mask)
        return self.wo(out_BHTd.transpose(1, 2).reshape(batch, time, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate = LowPrecisionLinear(config.width, config.ffn_width)
        self.w_up = LowPrecisionLinear(config.width, config.ffn_width)
        self.w_down = LowPrecisionLinear(config.ffn_width, config.width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.w_down(functional.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream. A mixture of experts will take the place of `ffn`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: Mask, attend: Attend) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), cos, sin, mask, attend)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Transformer(nn.Module):
    """Tokens to logits. Build it on the meta device and fill it with `initialise` or from a checkpoint."""

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.attend = attend
        self.recompute = False  # keep only block inputs and compute the rest again in the backward pass
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.layers)})
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, doc_ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] in the compute dtype."""
        mask = document_mask(doc_ids_BT, positions_BT, self.attend)
        cos, sin = rotary_table(positions_BT, self.config.head_dim, self.config.rope_theta)
        x_BTD = self.embed(tokens_BT)
        for block in self.layers.values():
            if self.recompute and torch.is_grad_enabled():
                x_BTD = cast(Any, checkpoint(block, x_BTD, cos, sin, mask, self.attend, use_reentrant=False))
            else:
                x_BTD = block(x_BTD, cos, sin, mask, self.attend)
        x_BTD = self.norm(x_BTD)
        return functional.linear(x_BTD, self.embed.weight) if self.head is None else self.head(x_BTD)

    def blocks(self) -> list[nn.Module]:
        """What the model says about itself to `parallel`: the repeated parts, in order, each sharded and compiled as one."""
        return list(self.layers.values())
