"""A mixture of experts in the place of a block's feed-forward.

    ffn.router.{weight [E, D], bias [E]}   ffn.experts.{w_gate, w_up [E, F, D], w_down [E, D, F]}   ffn.shared.{w_gate, w_up, w_down}.weight

Every token goes to the k experts of highest score; the router works in fp32. Whatever is balanced or limited is so *per sequence*, because a
sequence is the largest thing that no plan and no micro-batch changes: the same run, split otherwise, routes alike. Shapes: N tokens,
E experts, k choices.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from regrowth.kernels.gemm import Cut, Site
from regrowth.kernels.linear import LowPrecisionLinear, low_precision_linear
from regrowth.kernels.recipe import HIGH
from regrowth.parallel.expert_parallel import run_on_experts
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.model_parallel import ModelParallel
from regrowth.pretrain.model_config import ModelConfig, MoEConfig

STATISTICS = ("tokens", "entropy", "dropped")  # what a router counts besides each expert's load


class Router(nn.Module):
    """Scores, the choice of experts, and what keeps it balanced."""

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        # Added to scores for choosing only (Wang et al. 2024, arXiv 2408.15664); no gradient, moved between steps by `rebalance`.
        self.bias: torch.Tensor
        self.register_buffer("bias", torch.zeros(config.experts, dtype=torch.float32))
        self.parallel = ModelParallel()
        self.recomputing = False
        self.counts: torch.Tensor | None = None  # fp64 [E + 3]: loads and STATISTICS since they were last taken

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen experts int64 [B, T, k], -1 where dropped; their weights fp32 [B, T, k], which carry the auxiliary losses' gradient)."""
        c = self.config
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits_BTE = functional.linear(x_BTD.float(), self.weight.float())
        scores_BTE = logits_BTE.softmax(-1) if c.gate == "softmax" else logits_BTE.sigmoid()
        chosen_BTk = torch.topk(scores_BTE.detach() + self.bias, c.top_k, dim=-1).indices
        weights_BTk = scores_BTE.gather(-1, chosen_BTk)
        if c.normalize:
            weights_BTk = weights_BTk / (weights_BTk.sum(-1, keepdim=True) + 1e-20)
        hits_BTE = torch.zeros_like(scores_BTE).scatter_(-1, chosen_BTk, 1.0) * valid_BT[..., None]
        if torch.is_grad_enabled() and (c.balance_loss or c.z_loss):
            weights_BTk = self.parallel.auxiliary.inject(weights_BTk, self._losses(logits_BTE, scores_BTE, hits_BTE, valid_BT))
        if c.capacity is not None:
            chosen_BTk = self._limited(chosen_BTk, valid_BT)
        if torch.is_grad_enabled() and not self.recomputing:
            self._count(scores_BTE, hits_BTE, chosen_BTk, valid_BT)
        return chosen_BTk, weights_BTk * c.scale

    def _losses(self, logits: torch.Tensor, scores: torch.Tensor, hits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The sum over tokens: per sequence its tokens times E / k * sum_i f_i P_i (DeepSeek-V3, arXiv 2412.19437, eq. 17-20), and z-loss
        (ST-MoE, arXiv 2202.08906, eq. 5)."""
        c, parallel = self.config, self.parallel
        share = scores / scores.sum(-1, keepdim=True) if c.gate == "sigmoid" else scores
        load_BE = parallel.cp.sum(hits.sum(1))
        tokens_B1 = parallel.cp.sum(valid.float().sum(1, keepdim=True)).clamp(min=1.0)
        probability_BE = (share * valid[..., None]).sum(1)  # of this rank's tokens; the loss is linear in them
        balance = (load_BE / tokens_B1 * probability_BE).sum() * c.experts / c.top_k
        return c.balance_loss * balance + c.z_loss * (torch.logsumexp(logits, -1).square() * valid).sum()

    def _limited(self, chosen_BTk: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        """-1 for choices beyond an expert's capacity in their sequence: first choices come first, then earlier positions (GShard)."""
        c, cp = self.config, self.parallel.cp
        assert c.capacity is not None
        whole_BTk = cp.gather(torch.where(valid_BT[..., None], chosen_BTk, -1))
        length = whole_BTk.shape[1]
        limit = math.ceil(c.capacity * c.top_k * length / c.experts)
        queue_BS = whole_BTk.transpose(1, 2).flatten(1)  # all first choices, then all second choices
        hits_BSE = functional.one_hot(queue_BS.clamp(min=0), c.experts) * (queue_BS >= 0)[..., None]
        place_BS = (hits_BSE.cumsum(1) * hits_BSE).sum(-1)
        kept_BTk = ((place_BS > 0) & (place_BS <= limit)).unflatten(1, (c.top_k, length)).transpose(1, 2)
        return torch.where(cp.part(kept_BTk), chosen_BTk, -1)

    @torch.no_grad()
    def _count(self, scores: torch.Tensor, hits: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor) -> None:
        share = scores / scores.sum(-1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-20).log()).sum(-1)
        dropped = ((chosen < 0) & valid[..., None]).sum()
        seen = torch.cat((hits.sum((0, 1)).double(), torch.stack((valid.sum(), (entropy * valid).sum(), dropped)).double()))
        self.counts = seen if self.counts is None else self.counts + seen

    @torch.no_grad()
    def rebalance(self, load_E: torch.Tensor) -> None:
        """Move the bias of each expert against its load over a step, by a fixed amount (arXiv 2408.15664, algorithm 1)."""
        if self.config.bias_rate:
            self.bias.add_(self.config.bias_rate * torch.sign(load_E.mean() - load_E).to(self.bias.dtype))


class Experts(nn.Module):
    """SwiGLU experts, stacked."""

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(config.experts, config.expert_width, width))
        self.w_up = nn.Parameter(torch.empty(config.experts, config.expert_width, width))
        self.w_down = nn.Parameter(torch.empty(config.experts, width, config.expert_width))
        self.kind, self.precision, self.site = "ffn", HIGH, Site()
        self.cut, self.cut_down = Cut(), Cut()  # of the first matrices and of the second
        self.ep_rank = 0

    def forward(self, rows_ND: torch.Tensor, counts: list[int], index_N: torch.Tensor | None = None) -> torch.Tensor:
        """Rows sorted by expert, `counts[e]` for expert e (of those that this rank holds); `index_N` numbers their tokens where rounding is by chance."""
        gate, up = (self._grouped(rows_ND, name, counts, self.cut, index_N) for name in ("w_gate", "w_up"))
        return self._grouped(functional.silu(gate) * up, "w_down", counts, self.cut_down, index_N)

    def _grouped(self, rows: torch.Tensor, name: str, counts: list[int], cut: Cut, index_N: torch.Tensor | None) -> torch.Tensor:
        weight: torch.Tensor = getattr(self, name)
        if rows.is_cuda and self.precision.is_high and torch.is_autocast_enabled("cuda"):
            ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
            return torch._grouped_mm(rows.bfloat16(), weight.bfloat16().transpose(1, 2), offs=ends)
        if self.precision.is_high:
            return torch.cat([functional.linear(part, matrix) for part, matrix in zip(rows.split(counts), weight.unbind(0), strict=True)])
        indices = [None] * len(counts) if index_N is None else index_N.split(counts)
        first, parts = self.ep_rank * len(weight), []
        for expert, (part, matrix, index) in enumerate(zip(rows.split(counts), weight.unbind(0), indices, strict=True), first):
            # Only where it matters: a site is every layer's own, and would have each of them compiled.
            needed = self.precision.draws or self.site.remembers
            site = replace(self.site, name=f"{self.site.name}.{name}", part=expert, tokens=index) if needed else None
            parts.append(low_precision_linear(part, matrix, self.precision, cut, site))
        return torch.cat(parts)


class MoE(nn.Module):
    """Router, routed experts and shared ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.config = config.moe
        self.router = Router(config.width, self.config)
        self.experts = Experts(config.width, self.config)
        self.shared = SwiGLU(config.width, self.config.shared_width) if self.config.shared_width else None
        self.parallel = ModelParallel()

    def forward(self, x_BTD: torch.Tensor, valid_BT: torch.Tensor, index_BT: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; with tp this rank's part of a sum over its ranks. `index_BT` numbers the tokens where rounding is by chance."""
        chosen_BTk, weights_BTk = self.router(x_BTD, valid_BT)
        rows = x_BTD[:, :, None].expand(*chosen_BTk.shape, -1).reshape(-1, x_BTD.shape[-1])
        index_N = None if index_BT is None else index_BT[..., None].expand_as(chosen_BTk).flatten()
        out = run_on_experts(rows, chosen_BTk.flatten(), self.config.experts, self.experts, self.parallel.ep, index_N)
        mixed = (out.view(*chosen_BTk.shape, -1) * weights_BTk[..., None].to(out.dtype)).sum(2)
        return mixed if self.shared is None else mixed + self.shared(x_BTD)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_gate = LowPrecisionLinear(width, hidden)
        self.w_up = LowPrecisionLinear(width, hidden)
        self.w_down = LowPrecisionLinear(hidden, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.w_down(functional.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD))


@torch.no_grad()
def balance(modules: Iterable[nn.Module], config: ModelConfig, mesh: Mesh, move: bool = True) -> dict[int, torch.Tensor]:
    """Between two steps: what the routers of all ranks counted, fp64 [E + 3] (loads, then STATISTICS) by layer; unless the step made
    no update, their biases are moved by it."""
    if not config.expert_count:
        return {}
    routers = {int(name.split(".")[1]): m for module in modules for name, m in module.named_modules() if isinstance(m, Router)}
    layers = [i for i in range(config.layers) if config.is_moe(i)]
    counts = torch.zeros(len(layers), config.expert_count + len(STATISTICS), dtype=torch.float64, device=mesh.device)
    for row, layer in zip(counts, layers, strict=True):
        if layer in routers and (seen := routers[layer].counts) is not None:
            row.copy_(seen)
            routers[layer].counts = None
    if mesh.plan.world_size > 1:
        dist.all_reduce(counts)
        counts /= mesh.plan.tp  # whose ranks all see the same tokens
    for row, layer in zip(counts, layers, strict=True):
        if move and layer in routers:
            routers[layer].rebalance(row[: config.expert_count])
    return dict(zip(layers, counts.cpu(), strict=True))


def router_rows(counts: dict[int, torch.Tensor], config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What `balance` gave, for people: by layer the load of each expert as a multiple of its even share, the mean entropy of a token's scores in
    nats, and the share of choices that were dropped."""
    assert config.moe is not None
    rows = {}
    for layer, row in counts.items():
        load, (tokens, entropy, dropped) = row[: config.moe.experts], row[config.moe.experts :].tolist()
        rows[str(layer)] = {
            "load": [round(x, 4) for x in (load / load.mean().clamp(min=1e-9)).tolist()],
            "entropy": entropy / max(tokens, 1.0),
            "dropped": dropped / max(tokens * config.moe.top_k, 1.0),
        }
    return rows
