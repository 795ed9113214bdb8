"""A decoder-only Transformer whose parameter names are the canonical ones.

    embed.weight   layers.{i}.attn_norm.weight   layers.{i}.attn.{wq,wk,wv,wo}.weight   layers.{i}.attn.{q,k}_norm.weight
    layers.{i}.ffn_norm.weight   layers.{i}.ffn.{w_gate,w_up,w_down}.weight (or a mixture's: moe.py)   norm.weight   head.weight (absent when tied)

Layers are keyed by their global index, so that a pipeline stage's names are the whole model's. RoPE takes explicit positions and the mask
compares (document, position): packing, padding and context parallelism agree. The same code runs on slices: `parallel` holds what a split
needs, and alone it does nothing. Shapes: B batch, T time, D width, H heads, d head dim, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from regrowth.kernels.cross_entropy import linear_cross_entropy
from regrowth.kernels.gemm import Cut
from regrowth.kernels.linear import LowPrecisionLinear, low_precision_modules, set_precision
from regrowth.kernels.pointwise import rms_norm, rotate
from regrowth.kernels.quantize import AmaxGroups
from regrowth.kernels.recipe import PrecisionRecipe
from regrowth.kernels.tables import AmaxHistory, RoundingErrors
from regrowth.parallel.collectives import gather
from regrowth.parallel.layout import ParameterSplit
from regrowth.parallel.model_parallel import ModelParallel
from regrowth.parallel.tensor_parallel import ALONE
from regrowth.pretrain.attention import Attend, Mask
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.moe import Experts, MoE, Router, SwiGLU


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dim."""
        return rms_norm(x, self.weight, self.eps)


def rotary_table(positions_BT: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin [B, T, 1, d] of RoPE at explicit positions, as `rotate` takes them."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
    angles_BT1d = (positions_BT.float()[..., None] * (1.0 / theta**exponents))[:, :, None]
    cos, sin = angles_BT1d.cos(), angles_BT1d.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


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
        """[B, T, D] -> [B, T, D]; with tp this rank's part of a sum over its ranks."""
        batch, time, _ = x_BTD.shape
        q_BTHd, k_BTHd, v_BTHd = (w(x_BTD).view(batch, time, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHd, k_BTHd = self.q_norm(q_BTHd), self.k_norm(k_BTHd)
        q_BTHd, k_BTHd = rotate(q_BTHd, cos, sin), rotate(k_BTHd, cos, sin)
        out_BHTd = attend(q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHd.transpose(1, 2), mask)
        return self.wo(out_BHTd.transpose(1, 2).reshape(batch, time, -1))


class Block(nn.Module):
    """Pre-norm attention and feed-forward (or a mixture of experts), each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = MoE(config) if config.is_moe(layer) else SwiGLU(config.width, config.ffn_width)
        self.tp = ALONE

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask,
        valid_BT: torch.Tensor,
        attend: Attend,
        index_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; T is this rank's part of it under sequence parallelism. `index_BT` numbers the tokens where rounding is by chance."""
        if index_BT is not None:  # here, so that a block that is run again has its own
            for module in self.modules():
                if isinstance(module, LowPrecisionLinear):
                    module.site.tokens = index_BT
        x_BTD = x_BTD + self.tp.leave(self.attn(self.tp.enter(self.attn_norm(x_BTD)), cos, sin, mask, attend))
        inside = self.tp.enter(self.ffn_norm(x_BTD))
        return x_BTD + self.tp.leave(self.ffn(inside, valid_BT, index_BT) if isinstance(self.ffn, MoE) else self.ffn(inside))


class Transformer(nn.Module):
    """Tokens to logits or losses; or one pipeline stage of it. Build it on the meta device and fill it with `initialise` or from a checkpoint.

    Args:
        layers: the layers of this stage; None for all.
        first: whether the stage takes tokens; others take hidden states.
        last: whether the stage has the final norm and the head; others give hidden states.
    """

    def __init__(self, config: ModelConfig, attend: Attend, layers: range | None = None, first: bool = True, last: bool = True) -> None:
        super().__init__()
        self.config, self.attend, self.first, self.last = config, attend, first, last
        self.recompute, self.recompute_every = "none", 1
        self.z_loss = 0.0
        self.draws = False  # whether linears round by chance
        needs_embedding = first or (last and config.tied)
        self.embed = nn.Embedding(config.vocabulary, config.width) if needs_embedding else None
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in (range(config.layers) if layers is None else layers)})
        self.norm = RMSNorm(config.width, config.norm_eps) if last else None
        self.head = nn.Linear(config.width, config.vocabulary, bias=False) if last and not config.tied else None
        self.use(ModelParallel(), attend)

    def use(self, parallel: ModelParallel, attend: Attend) -> None:
        """Run on slices from now on."""
        self.parallel, self.attend = parallel, attend
        for module in self.modules():
            if isinstance(module, Block):
                module.tp = parallel.tp
            elif isinstance(module, MoE | Router):
                module.parallel = parallel
        for name, module in self.named_modules():
            if isinstance(module, LowPrecisionLinear):
                module.cut = self._cut(second=name.endswith((".wo", ".w_down")))
            elif isinstance(module, Experts):
                module.cut, module.cut_down = self._cut(second=False, experts=True), self._cut(second=True, experts=True)
                module.ep_rank = parallel.ep.rank() if parallel.ep is not None else 0

    def follow(
        self, recipe: PrecisionRecipe, seed: int, step: int, history: AmaxHistory | None = None, errors: RoundingErrors | None = None
    ) -> None:
        """Let the linears compute by a recipe from now on; `seed`, `step` and a linear's name decide what is drawn."""
        set_precision(self, recipe, self.config.layers, seed, step)
        self.draws = recipe.draws
        for module in low_precision_modules(self).values():
            module.site.history, module.site.errors = history, errors

    def _cut(self, second: bool, experts: bool = False) -> Cut:
        """Where the ranks cut what a linear's GEMMs contract: inputs of the second of a pair, outputs of the first, tokens everywhere."""
        tp, anywhere = self.parallel.tp.group, self.parallel.sequence
        context = self.parallel.cp.group
        if experts and self.parallel.ep is not None:  # neighbours in cp may hold other experts: an expert's tokens have come here
            anywhere, context = tp, None
        within, tokens = AmaxGroups(tensor=anywhere), AmaxGroups(context, anywhere)
        split = AmaxGroups(tp, anywhere)
        place = {"rank": tp.rank(), "ranks": tp.size()} if tp is not None else {}
        return Cut(forward=split if second else within, dgrad=within if second else split, wgrad=tokens, along_out=not second, **place)

    def forward(
        self,
        x: torch.Tensor,
        positions_BT: torch.Tensor,
        doc_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor | None = None,
        loss_weight_BT: torch.Tensor | None = None,
        index_BT: torch.Tensor | None = None,
    ) -> Any:
        """A stage that is not the last gives hidden states [B, T, D].

        The last gives logits [B, T, V]; or with labels and weights (the sum over tokens of loss_weight * (nll + z_loss * log(Z)^2) as fp32 [1],
        nll fp32 [B, T] in nats), without ever holding the logits.

        Args:
            x: token ids [B, T], or what the stage before gave.
            index_BT: int64, a number for each token that is the same under every split; needed by recipes that round by chance.
        """
        mask = self.attend.mask(doc_ids_BT, positions_BT)
        cos, sin = rotary_table(positions_BT, self.config.head_dim, self.config.rope_theta)
        valid_BT = doc_ids_BT >= 0
        if self.first:
            assert self.embed is not None
            x = self.parallel.tp.embed(x, self.embed.weight)
            if torch.is_autocast_enabled(x.device.type):  # the residual stream is in the dtype of the products that are added to it
                x = x.to(torch.get_autocast_dtype(x.device.type))
        for name, block in self.layers.items():
            x = self._run(block, int(name), x, cos, sin, mask, valid_BT, self.attend, index_BT if self.draws else None)
        if self.norm is None:
            return x
        x_BTD = self.parallel.tp.enter(self.norm(x))
        weight_VD = self.head.weight if self.head is not None else self.embed.weight if self.embed is not None else None
        assert weight_VD is not None
        if labels_BT is None or loss_weight_BT is None:
            return gather(functional.linear(x_BTD, weight_VD), 2, self.parallel.tp.group)
        total, nll = linear_cross_entropy(
            x_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), loss_weight_BT.flatten(), self.z_loss, self.parallel.tp.group
        )
        return total, nll.view(labels_BT.shape)

    def _run(self, block: nn.Module, layer: int, *args: Any) -> torch.Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled() or layer % self.recompute_every:
            return block(*args)
        context = partial(_recompute_contexts, block, self.recompute == "selective")
        return checkpoint(block, *args, use_reentrant=False, context_fn=context)  # pyright: ignore[reportReturnType]

    def blocks(self) -> list[nn.Module]:
        """What the model says about itself to `parallel`: the repeated parts, in order, each sharded and compiled as one."""
        return list(self.layers.values())

    def expert_modules(self) -> list[nn.Module]:
        """The modules whose parameters `ep` cuts."""
        return [module.experts for module in self.modules() if isinstance(module, MoE)]

    def routers(self) -> dict[int, Router]:
        """The routers by layer."""
        return {int(i): block.ffn.router for i, block in self.layers.items() if isinstance(block, Block) and isinstance(block.ffn, MoE)}

    def parameter_split(self, name: str) -> ParameterSplit:
        """How a parameter may be cut: the first matrices of a pair by output, the second by input, the vocabulary by rows, experts by expert."""
        sequence = self.parallel.tp.sequence
        if name.endswith((".wq.weight", ".wk.weight", ".wv.weight", ".w_gate.weight", ".w_up.weight")) or name in (
            "embed.weight",
            "head.weight",
        ):
            return ParameterSplit(tp=0)
        if name.endswith((".wo.weight", ".w_down.weight")):
            return ParameterSplit(tp=1)
        if name.endswith((".experts.w_gate", ".experts.w_up")):
            return ParameterSplit(tp=1, expert=True)
        if name.endswith(".experts.w_down"):
            return ParameterSplit(tp=2, expert=True)
        # Within a split region every rank has its own heads or partial sums; outside, its own part of the sequence.
        return ParameterSplit(partial=sequence or name.endswith((".q_norm.weight", ".k_norm.weight", ".router.weight")))


_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_mm.default,
}


def _save_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute_contexts(block: nn.Module, selective: bool) -> tuple[Any, Any]:
    """Contexts of the first run of a block and of its second, in which routers do not count again."""
    first, second = create_selective_checkpoint_contexts(_save_products) if selective else (nullcontext(), nullcontext())
    return first, _recomputing(block, second)


@contextmanager
def _recomputing(block: nn.Module, inner: Any) -> Iterator[None]:
    routers = [module for module in block.modules() if isinstance(module, Router)]
    for router in routers:
        router.recomputing = True
    try:
        with inner:
            yield
    finally:
        for router in routers:
            router.recomputing = False
