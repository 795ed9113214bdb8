"""The mixture of experts: equal to a slow one and to transformers' own, balanced as published."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from regrowth.kernels.linear import set_precision
from regrowth.parallel.expert_parallel import run_on_experts
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.attention import Sdpa
from regrowth.pretrain.initialise import initialise
from regrowth.pretrain.model import Transformer
from regrowth.pretrain.model_config import ModelConfig, MoEConfig
from regrowth.pretrain.moe import MoE, balance, router_rows
from regrowth.pretrain.precision import load_recipe

SMALL: dict[str, Any] = {
    "vocabulary": 97,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn_width": 48,
    "tied": False,
}


def model_of(**moe: Any) -> Transformer:
    config = ModelConfig(**SMALL, moe=MoEConfig(**{"experts": 6, "top_k": 2, "expert_width": 20, **moe}))
    with torch.device("meta"):
        model = Transformer(config, Sdpa())
    model.to_empty(device="cpu")
    initialise({**dict(model.named_parameters()), **dict(model.named_buffers())}, config, seed=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("norm.weight"):
                p.mul_(6.0)
    return model


def moe_of(**moe: Any) -> MoE:
    block: Any = model_of(**moe).layers["1"]
    return block.ffn


def inputs(batch: int = 3, time: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, time, 32, generator=torch.Generator().manual_seed(4))
    valid = torch.ones(batch, time, dtype=torch.bool)
    valid[0, -5:] = False
    return x, valid


def slowly(moe: MoE, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Token by token, choice by choice."""
    c, out = moe.config, torch.zeros_like(x)
    for b in range(len(x)):
        limit = math.inf if c.capacity is None else math.ceil(c.capacity * c.top_k * x.shape[1] / c.experts)
        used, chosen = [0] * c.experts, {}
        for t in range(x.shape[1]):
            logits = moe.router.weight @ x[b, t]
            scores = logits.softmax(0) if c.gate == "softmax" else logits.sigmoid()
            order = (scores + moe.router.bias).argsort(descending=True)[: c.top_k].tolist()
            weights = scores[order] / scores[order].sum() if c.normalize else scores[order]
            chosen[t] = list(zip(order, weights * c.scale, strict=True))
        kept = set()
        for choice in range(c.top_k):
            for t in range(x.shape[1]):
                expert = chosen[t][choice][0]
                if c.capacity is None or valid[b, t]:
                    used[expert] += 1
                    if used[expert] <= limit:
                        kept.add((t, choice))
        for t, choice in kept:
            expert, weight = chosen[t][choice]
            e = moe.experts
            hidden = functional.silu(e.w_gate[expert] @ x[b, t]) * (e.w_up[expert] @ x[b, t])
            out[b, t] += weight * (e.w_down[expert] @ hidden)
    return out if moe.shared is None else out + moe.shared(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "sigmoid", "scale": 2.5}, {"normalize": False}, {"shared_width": 12}, {"capacity": 1.0}, {"capacity": 0.5, "top_k": 3}, {"top_k": 1}, {"top_k": 6}],
    ids=str,
)  # fmt: skip
def test_it_computes_what_a_slow_one_computes(options: dict) -> None:
    moe = moe_of(**options)
    moe.router.bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1, 0.0, -0.1]))
    x, valid = inputs()
    with torch.no_grad():
        torch.testing.assert_close(moe(x, valid), slowly(moe, x, valid), rtol=1e-4, atol=1e-5)


def test_logits_equal_transformers_own_qwen3_moe() -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of()
    config, moe = model.config, model.config.moe
    assert moe
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        vocab_size=config.vocabulary, hidden_size=config.width, intermediate_size=config.ffn_width, moe_intermediate_size=moe.expert_width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        num_experts=moe.experts, num_experts_per_tok=moe.top_k, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta, tie_word_embeddings=False, attention_bias=False,
    )).eval()  # fmt: skip
    ours = dict(model.named_parameters())
    wanted = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn.router", "self_attn.q_norm": "attn.q_norm",
             "self_attn.k_norm": "attn.k_norm", **{f"self_attn.{k}_proj": f"attn.w{k}" for k in "qkvo"}}  # fmt: skip
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name in wanted:
            state[name] = ours[wanted[name]]
            continue
        _, _, layer, rest = name.split(".", 3)
        here = f"layers.{layer}."
        if rest.startswith("mlp.experts"):
            experts = f"{here}ffn.experts."
            gate_up = torch.cat((ours[f"{experts}w_gate"], ours[f"{experts}w_up"]), dim=1)
            state[name] = (gate_up if "gate_up" in rest else ours[f"{experts}w_down"]).reshape(tensor.shape)
        else:
            state[name] = ours[here + parts[rest.removesuffix(".weight")] + ".weight"]
    theirs.load_state_dict(state)
    tokens = torch.randint(0, config.vocabulary, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(tokens, torch.arange(24).expand(2, 24), torch.zeros_like(tokens))
        torch.testing.assert_close(got, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_injected_losses_have_the_gradient_of_the_formula(gate: str) -> None:
    """Per sequence: its tokens times E / k * sum_i f_i P_i; and z-loss; both times the scale of the main loss."""
    moe = moe_of(gate=gate, balance_loss=0.7, z_loss=0.3)
    x, valid = inputs()
    c, router = moe.config, moe.router
    router.parallel.auxiliary.scale = 0.25
    chosen, weights = router(x, valid)
    (got,) = torch.autograd.grad(weights.sum() * 0.0, router.weight)
    logits = x @ router.weight.t()
    scores = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
    share, total = scores / scores.sum(-1, keepdim=True), torch.zeros(())
    for b in range(len(x)):
        tokens = int(valid[b].sum())
        load = torch.bincount(chosen[b][valid[b]].flatten(), minlength=c.experts) / (tokens * c.top_k)
        total = total + tokens * c.balance_loss * c.experts * (load * share[b][valid[b]].mean(0)).sum()
        total = total + c.z_loss * torch.logsumexp(logits[b][valid[b]], -1).square().sum()
    (expected,) = torch.autograd.grad(0.25 * total, router.weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_an_even_load_has_the_smallest_balance_loss_and_it_is_one() -> None:
    moe = moe_of(balance_loss=1.0)
    valid = torch.ones(1, 12, dtype=torch.bool)
    hits = torch.zeros(1, 12, 6)
    even = torch.full((1, 12, 6), 1 / 6)
    for t in range(12):
        hits[0, t, [t % 6, (t + 1) % 6]] = 1.0
    assert moe.router._losses(even.log(), even, hits, valid).item() == pytest.approx(12.0), "one for each token"


def test_the_bias_moves_loads_together() -> None:
    moe = moe_of(gate="sigmoid", balance_loss=0.0, bias_rate=0.02)
    config = ModelConfig(**SMALL, moe=moe.config)
    mesh = Mesh(ParallelPlan(), torch.device("cpu"))
    holder = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"1": torch.nn.ModuleDict({"ffn": moe})})})
    config = config.model_copy(update={"moe": moe.config.model_copy(update={"pattern": ["dense", "moe"]})})
    spread = []
    for step in range(150):
        x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(step)) + 2.0
        moe(x, torch.ones(4, 64, dtype=torch.bool))
        (counts,) = balance([holder], config, mesh).values()
        spread.append(float(counts[:6].std() / counts[:6].mean()))
        assert counts[:6].sum() == 4 * 64 * 2 and counts[6] == 4 * 64 and counts[8] == 0
    assert sum(spread[-10:]) / 10 < 0.5 * sum(spread[:5]) / 5
    row = router_rows({1: counts}, config)["1"]
    assert sum(row["load"]) == pytest.approx(6, abs=1e-3) and 0 < row["entropy"] < math.log(6) and row["dropped"] == 0


def test_rows_of_no_expert_come_back_as_zeros_and_nothing_is_computed_for_them() -> None:
    seen = []

    def run(rows: torch.Tensor, counts: list[int], index: torch.Tensor | None) -> torch.Tensor:
        seen.append(counts)
        return rows * torch.repeat_interleave(torch.tensor([1.0, 10.0, 100.0]), torch.tensor(counts))[:, None]

    rows = torch.arange(1.0, 6.0)[:, None].requires_grad_()
    out = run_on_experts(rows, torch.tensor([2, -1, 0, 2, -1]), 3, run)
    assert out[:, 0].tolist() == [100.0, 0.0, 3.0, 400.0, 0.0] and seen == [[1, 0, 2]]
    out.sum().backward()
    assert rows.grad is not None and rows.grad[:, 0].tolist() == [100.0, 0.0, 1.0, 100.0, 0.0]


def test_parameters_and_flops_count_all_experts_and_those_a_token_passes() -> None:
    model = model_of(shared_width=8)
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == config.parameters
    assert config.parameters - config.active_parameters == 2 * 4 * 3 * 20 * 32
    from torch.utils.flop_counter import FlopCounterMode

    from tests.pretrain.test_model import SpelledOut

    model.use(model.parallel, SpelledOut())
    tokens = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(16).expand(2, 16), torch.zeros_like(tokens)).sum().backward()
    assert counter.get_total_flops() == config.train_flops_per_token(16) * tokens.numel()


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp4_paper"])
def test_experts_without_a_token_stand_in_no_recipes_way(recipe: str) -> None:
    moe = moe_of(experts=6, top_k=1)
    set_precision(moe, load_recipe(recipe), layers=1)
    x = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(4))
    moe(x, torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert moe.experts.w_up.grad is not None and torch.isfinite(moe.experts.w_up.grad).all()
    assert sum(bool(g.any()) for g in moe.experts.w_up.grad) <= 2
