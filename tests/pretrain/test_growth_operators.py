"""Operators: functions that stay, gradients that moments follow, and what does not fit, said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.errors import UserError
from regrowth.pretrain.attention import Sdpa
from regrowth.pretrain.checkpoint import canonical_shapes, has_moments
from regrowth.pretrain.growth.advice import growth_tokens
from regrowth.pretrain.growth.grow import grown_reader
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.plan import GrowthPlan, plan_of
from regrowth.pretrain.growth.random_pad import RandomPad
from regrowth.pretrain.initialise import initialise
from regrowth.pretrain.model import Transformer
from regrowth.pretrain.model_config import ModelConfig, MoEConfig
from regrowth.settings import validate

SMALL = ModelConfig(vocabulary=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=6, ffn_width=40, init_std=0.3, tied=False)
MOE = MoEConfig(experts=4, top_k=2, expert_width=20, shared_width=8, balance_loss=0.0)


def state_of(config: ModelConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights as after some training: gains that are not 1 among them."""
    weights = {name: torch.empty(shape) for name, shape in canonical_shapes(config).items()}
    initialise(weights, config, seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: w if name.endswith("bias") else w + 0.2 * torch.randn(w.shape, generator=generator) * (1 if w.ndim == 1 else 0.1)
        for name, w in weights.items()
    }


def model_of(config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> Transformer:
    """A model, in float64 unless told."""
    model = Transformer(config, Sdpa())
    model.load_state_dict(weights)
    return model.to(dtype)


def batch(config: ModelConfig) -> tuple[torch.Tensor, ...]:
    """Tokens, positions and documents [2, 12], and labels."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, config.vocabulary, (2, 12), generator=generator) for _ in range(2))
    return tokens, torch.arange(12).expand(2, 12), torch.zeros(2, 12, dtype=torch.int64), labels


def logits(config: ModelConfig, weights: dict[str, torch.Tensor], like: ModelConfig, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[2, 12, V] for the source's tokens."""
    tokens, positions, documents, _ = batch(like)
    with torch.no_grad():
        return model_of(config, weights, dtype)(tokens, positions, documents)


def gradients(config: ModelConfig, weights: dict[str, torch.Tensor], like: ModelConfig) -> dict[str, torch.Tensor]:
    """Of the loss by canonical name."""
    tokens, positions, documents, labels = batch(like)
    model = model_of(config, weights)
    total, _ = model(tokens, positions, documents, labels, torch.ones(2, 12, dtype=torch.float64))
    total.sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def grown(plan: GrowthPlan, config: ModelConfig, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor] | None = None) -> Any:
    """(config, weights, moments) after all operators."""
    if moments is None:
        moments = {f"{n}.{m}": torch.zeros_like(w) for n, w in weights.items() for m in ("exp_avg", "exp_avg_sq")}
    large = plan.configs(config)[-1]
    read = grown_reader(plan, config, (weights | moments).__getitem__)
    names = canonical_shapes(large)
    return (
        large,
        {n: read(n) for n in names},
        {f"{n}.{m}": read(f"{n}.{m}") for n in names if has_moments(n) for m in ("exp_avg", "exp_avg_sq")},
    )


KEEPING = {
    "hyperclone": {"op": "hyperclone"},
    "hyperclone, three with noise": {"op": "hyperclone", "factor": 3, "noise": 0.5},
    "width": {"op": "zero_pad", "width": 40},
    "heads": {"op": "zero_pad", "heads": 8},
    "KV heads": {"op": "zero_pad", "kv_heads": 4},
    "heads and KV heads": {"op": "zero_pad", "heads": 12, "kv_heads": 4},
    "groups of heads": {"op": "zero_pad", "heads": 6, "kv_heads": 3, "width": 40},
    "hidden": {"op": "zero_pad", "ffn_width": 64},
    "identities": {"op": "interpose", "zero_copies": True, "keep_last": 1},
    "silent stack": {"op": "stack", "layers": 5, "zero_copies": True},
}
EXPERTS = {
    "duplicate": {"op": "duplicate_experts", "noise": 0.0},
    "expert width": {"op": "zero_pad", "expert_width": 28, "shared_width": 16},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk-norm"])
@pytest.mark.parametrize("settings_", [*KEEPING.values(), {"op": "upcycle", "experts": 3}], ids=[*KEEPING, "upcycle"])
def test_dense_functions_stay(settings_: dict, tied: bool, qk_norm: bool) -> None:
    config = SMALL.model_copy(update={"tied": tied, "qk_norm": qk_norm, "norm_eps": 1e-9})
    weights, plan = state_of(config), plan_of(settings_, "here")
    large, new, _ = grown(plan, config, weights)
    assert plan.preserves_function(config) and large.parameters > config.parameters
    assert {n: w.shape for n, w in new.items()} == dict(canonical_shapes(large))
    torch.testing.assert_close(logits(large, new, config), logits(config, weights, config), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("settings_", [*KEEPING.values(), *EXPERTS.values()], ids=[*KEEPING, *EXPERTS])
def test_functions_of_experts_stay(settings_: dict, gate: str, normalize: bool) -> None:
    moe = MOE.model_copy(update={"gate": gate, "normalize": normalize, "pattern": ["dense", "moe"]})
    config = SMALL.model_copy(update={"moe": moe, "norm_eps": 1e-9})
    weights = state_of(config)
    large, new, _ = grown(plan_of(settings_, "here"), config, weights)
    torch.testing.assert_close(logits(large, new, config), logits(config, weights, config), rtol=1e-5, atol=1e-5)


@st.composite
def grown_configs(draw: st.DrawFn) -> tuple[ModelConfig, dict[str, Any]]:
    """A model's config, and an operator that keeps its function."""
    kv_heads, group, width, ffn = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(8, 24)), draw(st.integers(8, 32))
    values = {
        **{"vocabulary": 61, "width": width, "layers": draw(st.integers(1, 3)), "heads": kv_heads * group, "kv_heads": kv_heads},
        **{"head_dim": 2 * draw(st.integers(1, 4)), "ffn_width": ffn, "init_std": 0.3, "norm_eps": 1e-9},
        **{"tied": draw(st.booleans()), "qk_norm": draw(st.booleans())},
    }
    if mixture := draw(st.booleans()):
        gate = {"gate": draw(st.sampled_from(["softmax", "sigmoid"])), "normalize": draw(st.booleans())}
        values["moe"] = {
            **MOE.model_dump(),
            **gate,
            "pattern": draw(st.sampled_from([["moe"], ["dense", "moe"]][: values["layers"]])),
        }  # one layer with experts at least
    more = draw(st.integers(1, 12))
    operators = [
        {"op": "hyperclone", "factor": draw(st.integers(2, 3)), "noise": draw(st.sampled_from([0.0, 0.3]))},
        {"op": "zero_pad", "width": width + more},
        {"op": "zero_pad", "width": width + more, "heads": 2 * kv_heads * group, "kv_heads": 2 * kv_heads, "ffn_width": ffn + more},
        {"op": "zero_pad", "heads": 3 * kv_heads * group},
        {"op": "stack", "layers": values["layers"] + more, "zero_copies": True},
        {"op": "interpose", "zero_copies": True},
        {"op": "duplicate_experts", "noise": 0.0} if mixture else {"op": "upcycle", "experts": 3},
    ]
    return ModelConfig.model_validate(values), draw(st.sampled_from(operators))


@settings(max_examples=40, deadline=None)
@given(grown_configs(), st.booleans())
def test_functions_stay_whatever_the_config(drawn: tuple[ModelConfig, dict[str, Any]], double: bool) -> None:
    config, operator = drawn
    dtype, tolerance = (torch.float64, 2e-5) if double else (torch.float32, 1e-3)  # weights are stored in float32
    weights, plan = state_of(config), plan_of(operator, "here")
    large, new, _ = grown(plan, config, weights)
    assert plan.preserves_function(config)
    before, after = logits(config, weights, config, dtype), logits(large, new, config, dtype)
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * before.abs().max().item())


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(list(KEEPING)), min_size=2, max_size=3), st.booleans(), st.integers(0, 99))
def test_chains_of_keeping_operators_keep(names: list[str], tied: bool, seed: int) -> None:
    config = SMALL.model_copy(update={"tied": tied, "norm_eps": 1e-9, "layers": 2})
    weights = state_of(config, seed)
    plan = GrowthPlan.model_validate({"operators": [KEEPING[name] for name in names]})
    try:
        large, new, _ = grown(plan, config, weights)
    except UserError as error:  # sizes that an earlier one has passed already
        assert "zero_pad" in str(error) or "stack" in str(error) or "kv_heads" in str(error)
        return
    torch.testing.assert_close(logits(large, new, config), logits(config, weights, config), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("settings_", "moe"),
    [
        (KEEPING["hyperclone"], False),
        (KEEPING["hyperclone"], True),
        (KEEPING["identities"], False),
        (KEEPING["hidden"], False),
        (KEEPING["heads"], False),
        (KEEPING["width"], False),
        (EXPERTS["duplicate"], True),
    ],
    ids=lambda value: value["op"] if isinstance(value, dict) else "",
)
def test_moments_follow_as_gradients_do(settings_: dict, moe: bool, tied: bool) -> None:
    """Where an operator keeps the function, the target's gradients are the source's, carried by its rule for first moments; their squares by its rule for second
    ones. What is new has gradients of its own and moments of zero."""
    config = SMALL.model_copy(update={"tied": tied, "norm_eps": 1e-9, "moe": MOE if moe else None})
    weights = state_of(config)
    before = gradients(config, weights, config)
    moments = {f"{n}.exp_avg": g.float() for n, g in before.items()} | {f"{n}.exp_avg_sq": g.square().float() for n, g in before.items()}
    large, new, carried = grown(plan_of(settings_, "here"), config, weights, moments)
    compared = 0
    for name, gradient in gradients(large, new, config).items():
        first, second = carried[f"{name}.exp_avg"].double(), carried[f"{name}.exp_avg_sq"].double()
        old = second > 0
        torch.testing.assert_close(first[old], gradient[old], rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(second[old], gradient[old].square(), rtol=4e-3, atol=1e-3)
        assert (first[~old] == 0).all()
        compared += int(old.sum())
    assert compared > 0.9 * sum(w.numel() for n, w in weights.items() if not n.endswith("bias") and "embed" not in n)


@pytest.mark.parametrize(
    "settings_",
    [
        {"op": "fpi", "width": 40, "kv_heads": 3, "ffn_width": 64},
        {"op": "aki", "width": 48, "kv_heads": 4, "ffn_width": 80},
        {"op": "interpose", "factor": 3, "keep_first": 1},
        {"op": "duplicate_experts", "noise": 0.01},
        {"op": "upcycle", "noise": 0.1},
    ],
    ids=lambda value: value["op"],
)
def test_what_does_not_keep_the_function_says_so_and_has_the_right_entries(settings_: dict) -> None:
    config = SMALL.model_copy(update={"moe": MOE if "experts" in settings_["op"] else None})
    weights, plan = state_of(config), plan_of(settings_, "here")
    large, new, _ = grown(plan, config, weights)
    assert not plan.preserves_function(config)
    assert {n: w.shape for n, w in new.items()} == dict(canonical_shapes(large))
    name = "layers.0.attn.wo.weight"
    if settings_["op"] in ("fpi", "aki"):  # what reads copies is divided by how many there are: sums over what is read stay
        old = slice(0, config.width)
        torch.testing.assert_close(new[name][old].sum(1), weights[name].sum(1), rtol=1e-4, atol=1e-4)
        assert torch.equal(new["embed.weight"][:, old], weights["embed.weight"])
    if settings_["op"] == "aki":
        rows = new["layers.0.ffn.w_gate.weight"][config.ffn_width :].sum(1)
        next_ = weights["layers.1.ffn.w_gate.weight"].sum(1)
        assert all((next_ - row).abs().min() < 1e-4 for row in rows), "new neurons are the next layer's"
    if settings_["op"] == "interpose":
        assert large.layers == 7 and torch.equal(new["layers.6.attn.wo.weight"], weights["layers.2.attn.wo.weight"])
    if settings_["op"] == "duplicate_experts":
        both = new["layers.1.ffn.experts.w_up"].chunk(2)
        source = weights["layers.1.ffn.experts.w_up"]
        assert torch.equal(both[0], source) and float((both[1] - source).std()) == pytest.approx(0.01 * float(source.std()), rel=0.1)
        assert large.moe and (large.moe.experts, large.moe.top_k) == (8, 4)


def test_new_tokens_are_made_of_their_constituents(tmp_path: Path) -> None:
    (path := tmp_path / "constituents.json").write_text(json.dumps([[3], [4, 5, 9]]))
    weights = state_of(SMALL)
    large, new, _ = grown(plan_of({"op": "vocabulary", "size": 63, "constituents": str(path)}, "here"), SMALL, weights)
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(new[name][:61], weights[name]) and torch.equal(new[name][61], weights[name][3])
        torch.testing.assert_close(new[name][62], weights[name][[4, 5, 9]].mean(0))
    assert large.vocabulary == 63
    path.write_text("[[3], [61]]")
    with pytest.raises(UserError, match="it has to hold 2 lists, one for each new token, of ids from 0 to 60"):
        grown(plan_of({"op": "vocabulary", "size": 63, "constituents": str(path)}, "here"), SMALL, weights)


@pytest.mark.parametrize(
    ("settings_", "moe", "told"),
    [
        ({"op": "zero_pad", "width": 20}, False, "width = 20 .now 24.: growing only adds"),
        ({"op": "zero_pad"}, False, "name a size that is larger"),
        ({"op": "zero_pad", "expert_width": 90}, False, "expert_width is a size of experts, and the model has none"),
        ({"op": "zero_pad", "kv_heads": 3, "heads": 9}, False, "kv_heads = 3: choose from 2, 4"),
        (
            {"op": "zero_pad", "heads": 7},
            False,
            "^growth: zero_pad: model.heads = 7 is not a multiple of model.kv_heads = 2; choose kv_heads from 1, 7$",
        ),
        ({"op": "upcycle", "experts": 2, "top_k": 3}, False, "^growth: upcycle: model.moe.top_k = 3 is more than model.moe.experts = 2$"),
        ({"op": "stack", "layers": 3}, False, "layers = 3 is no growth of a model of 3 layers"),
        ({"op": "interpose", "keep_first": 2, "keep_last": 1}, False, "leave none of 3 layers"),
        ({"op": "duplicate_experts"}, False, "no experts; make some from its feed-forwards with upcycle"),
        ({"op": "upcycle"}, True, "has experts already; duplicate_experts"),
        ({"op": "fpi", "width": 48}, True, "made for dense models"),
        ({"op": "vocabulary", "size": 61}, False, "size = 61 is no growth of 61"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(settings_: dict, moe: bool, told: str) -> None:
    config = SMALL.model_copy(update={"moe": MOE if moe else None})
    with pytest.raises(UserError, match=told):
        plan_of(settings_, "here").configs(config)


@pytest.mark.parametrize(
    ("parameters", "tokens", "expected"), [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)]
)
def test_the_published_advice_on_when_to_grow(parameters: float, tokens: float, expected: float) -> None:
    assert growth_tokens(parameters, 6 * parameters * tokens) == pytest.approx(expected, rel=2e-3)


def test_settings_that_are_not_an_operator_s_own_are_told() -> None:
    for settings_, told in (
        ({"op": "stack", "width": 3}, 'unknown key "operators.0.width"'),
        ({"op": "hyperclone", "factor": 1}, "operators.0.factor = 1: input should be greater than or equal to 2"),
        ({"op": "clone"}, "no such op"),
    ):
        with pytest.raises(UserError, match=told):
            plan_of(settings_, "here")


@pytest.mark.parametrize("experts", [False, True])
def test_what_a_ramp_fades_in_is_what_the_growth_left_at_zero(experts: bool) -> None:
    config = SMALL.model_copy(update={"moe": MOE.model_copy(update={"pattern": ["dense", "moe"]}) if experts else None})
    sizes = {"width": 40, "heads": 8, "ffn_width": 64, **({"expert_width": 28} if experts else {})}
    plan = plan_of({"op": "random_pad", "ramp_steps": 3, **sizes}, "here")
    (operator,) = plan.operators
    assert isinstance(operator, RandomPad) and plan.preserves_function(config)
    large, new, _ = grown(plan, config, state_of(config))
    for name, weight in new.items():
        ramped = operator.ramped(TensorName.parse(name), config, large)
        if ramped is not None:
            assert torch.equal(torch.from_numpy(ramped), weight == 0), name
    with pytest.raises(UserError, match="random_pad changes weights while the run goes on"):
        validate(GrowthPlan, {"operators": [{"op": "random_pad", "width": 40}, {"op": "stack"}]}, "here")
