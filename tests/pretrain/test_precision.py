"""Recipes in runs: files and their faults, scales and fallen linears that survive a stop, and the same draws under every split."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import UserError
from regrowth.files import read_json
from regrowth.kernels.recipe import Fallback
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.planner import operand_bytes
from regrowth.pretrain import conformance
from regrowth.pretrain.build import build_model
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.config import load_config
from regrowth.pretrain.conformance import Setting, Shape, made_up_batch
from regrowth.pretrain.initialise import initialise
from regrowth.pretrain.loss import to_tensors
from regrowth.pretrain.model_config import ModelConfig, MoEConfig
from regrowth.pretrain.precision import linear_names, load_recipe, shipped
from regrowth.pretrain.precision_state import PrecisionState
from regrowth.pretrain.report.build import write_report
from regrowth.pretrain.run_folder import RunFolder
from tests.pretrain.helpers import Ranks, cut_back, go, losses, new_run

MODEL = {"vocabulary": 384, "width": 64, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 16, "ffn_width": 128, "init_std": 0.1}


def test_the_published_recipes_ship() -> None:
    assert {
        "bf16",
        "fp8_tensorwise",
        "fp8_rowwise",
        "fp8_delayed",
        "fp8_deepseek",
        "fp4_paper",
        "fp4_dge_occ",
        "nvfp4",
        "mxfp4_quartet",
    } <= set(shipped())
    assert all(load_recipe(name).name == name for name in shipped())
    nvfp4 = load_recipe("nvfp4")
    wide = [layer for layer in range(62) if nvfp4.of(f"layers.{layer}.ffn.w_up", "ffn", 62).is_high]
    assert wide == [0, 1, *range(54, 62)], "the paper's 12B model: the first two blocks and the last eight"
    assert nvfp4.ffn.wgrad.hadamard == 16 and not nvfp4.ffn.forward.hadamard
    assert (nvfp4.ffn.dgrad.a.rounding, nvfp4.ffn.dgrad.b.rounding) == ("stochastic", "nearest")


def test_names_of_linears_are_the_models() -> None:
    from regrowth.kernels.linear import low_precision_modules
    from regrowth.pretrain.attention import Sdpa
    from regrowth.pretrain.model import Transformer

    moe = MoEConfig(experts=4, top_k=2, expert_width=32, shared_width=16, pattern=["dense", "moe"])
    for config in (ModelConfig(**MODEL, tied=True), ModelConfig(**MODEL, tied=False, moe=moe)):  # type: ignore[arg-type]
        assert sorted(linear_names(config)) == sorted(low_precision_modules(Transformer(config, Sdpa())))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('name = "x"\nfirst_wid = 2', r'unknown key "first_wid"; did you mean "first_wide"\?'),
        ('[linears]\nforward = { a = "e4m4" }', r'"e4m4" is neither in the table quantizers nor a format; did you mean "e4m3"\?'),
        ('[quantizers]\nw = { format = "e3m4" }\n[ffn]\nforward = { b = "w" }', r"ffn\.forward\.b\.format = 'e3m4': input should be 'e2m1', 'e4m3' or 'e5m2'"),
        ('[quantizers]\nw = { format = "e2m1", granularty = "row" }\n[ffn]\nforward = { b = "w" }', r'unknown key "ffn\.forward\.b\.granularty"; did you mean "granularity"\?'),
        ('[linears]\n[ffn]', r"linears stands for attention and ffn; give the one or the others"),
        ("first_wide = 1.5", r"first_wide = 1\.5 is neither a number of blocks \(a whole one\) nor a share of them"),
        ('[ffn]\nestimator = "dge"', r'estimator = "dge" stands for the rounding of the weight; give forward\.b a format'),
        ('wide = ["layers.*.atn.*"]', r'"layers\.\*\.atn\.\*" names no linear of the model; did you mean "layers'),
        ('[ffn]\nforward = { a = "e4m3", b = "e4m3", hadamard = 128 }', r"model\.width = 192 is not a multiple of the precision recipe's Hadamard transforms of 128"),
        ('[ffn]\nestimator = "trust"\nforward = { a = "e4m3", b = "e4m3" }', r'estimator = "trust" is about what scale = "rms" clips'),
        ('[ffn]\nestimator = "dge"\nforward = { a = "e4m3", b = "e4m3", hadamard = 32 }', r"leave forward\.hadamard and scale"),
        ('[quantizers]\nt = { format = "e4m3", granularity = "tile", block = 96 }\n[ffn]\nforward = { a = "t", b = "e4m3" }', r"loader\.sequence_length / chunks = 256 is not a multiple"),
        ("[fallback]\nevery = 0", r"fallback: `every` is at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_told_by_key_value_and_remedy(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=told):
        load_config("quickstart", [f"precision.recipe={tmp_path / 'mine.toml'}"])


def test_a_recipe_of_ones_own_is_taken_into_the_runs_config(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\nwide = ["*.wo"]\n[linears]\nforward = { a = "e4m3", b = "e4m3" }')
    config = load_config("quickstart", [f"precision.recipe={tmp_path / 'mine.toml'}"])
    (tmp_path / "mine.toml").unlink()
    recipe = config.precision.build()
    assert (
        recipe.name == "mine"
        and recipe.of("layers.0.attn.wo", "attention", 2).is_high
        and not recipe.of("layers.0.attn.wq", "attention", 2).is_high
    )
    changed = type(config.precision).model_validate({**config.precision.model_dump(), "recipe": "fp8_rowwise"})
    assert changed.build().name == "fp8_rowwise", "a recipe that is named takes the place of the one that the run kept"
    with pytest.raises(
        UserError, match=r"nowhere\.toml: there is no such file\. Give a path to a TOML file or the name of a recipe \(full, bf16"
    ):
        load_config("quickstart", ["precision.recipe=nowhere.toml"])


def run_of(corpus: Corpus, path: Path, ranks: Ranks, **sections: Any) -> RunFolder:
    return go(new_run(corpus, path, **{"model": MODEL, **sections}), corpus, ranks)


def test_delayed_scales_are_in_the_checkpoint_and_a_resumed_run_is_the_same(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    run = run_of(corpus, tmp_path, ranks, precision={"recipe": "fp8_delayed"})
    whole = losses(run)
    scales = read_json(list_checkpoints(run.path)[-1] / "trainer.json")["precision"]["scales"]
    assert len(scales) == 2 * 7 and len(scales["layers.1.ffn.w_down"]["dgrad.a"]) == 16
    cut_back(run, 4)
    go(run, corpus, ranks)
    assert losses(run) == whole and not [e for e in run.rows("events") if e["event"] == "scales begin anew"]
    two = run_of(corpus, tmp_path / "two", ranks, precision={"recipe": "fp8_delayed"}, parallel={"dp_shard": 2, "micro_batch": 4})
    assert_allclose(losses(two), whole, rtol=2e-3)
    theirs = read_json(list_checkpoints(two.path)[-1] / "trainer.json")["precision"]["scales"]
    for name, operands in scales.items():  # of the first step, before the last bits part: the largest over both ranks
        assert_allclose(theirs[name]["forward.b"][7], operands["forward.b"][7], rtol=1e-6)
    assert_allclose(theirs["layers.0.attn.wq"]["forward.a"][7], scales["layers.0.attn.wq"]["forward.a"][7], rtol=1e-6)
    assert_allclose(theirs["layers.1.ffn.w_down"]["dgrad.a"][7], scales["layers.1.ffn.w_down"]["dgrad.a"][7], rtol=2e-2)


@pytest.mark.parametrize("plan", [{"dp_shard": 2, "micro_batch": 2}, {"pp": 2, "micro_batch": 2, "recompute": "full"}], ids=str)
def test_rounding_by_chance_draws_the_same_under_every_split(plan: dict[str, Any], corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    low = {"precision": {"recipe": "mxfp4_quartet"}, "run": {"steps": 4}}
    one = run_of(corpus, tmp_path / "one", ranks, parallel={"micro_batch": 4}, **low)
    split = run_of(corpus, tmp_path / "split", ranks, parallel=plan, **low)
    other = run_of(
        corpus, tmp_path / "other", ranks, parallel={"micro_batch": 4}, **low | {"run": {"steps": 4, "seed": 4}, "loader": {"seed": 3}}
    )
    assert_allclose(losses(split)[:2], losses(one)[:2], rtol=1e-5)
    assert losses(one)[0] != losses(other)[0]


def test_a_linear_that_loses_too_much_goes_wide_and_stays_so(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    """Four bits lose about a tenth of an operand, eight bits about a fortieth."""
    e2m1, e4m3 = {"format": "e2m1"}, {"format": "e4m3"}
    custom = {
        "name": "mixed",
        "attention": {"forward": {"a": e4m3, "b": e4m3}},
        "ffn": {"forward": {"a": e2m1, "b": e4m3}},
        "fallback": {"every": 3, "error": 0.06},
    }
    run = run_of(corpus, tmp_path, ranks, precision={"custom": custom}, parallel={"dp_replicate": 2, "micro_batch": 4})
    fallen = [e for e in run.rows("events") if e["event"] == "linear goes wide"]
    assert {e["linear"] for e in fallen} == {f"layers.{i}.ffn.{w}" for i in range(2) for w in ("w_gate", "w_up", "w_down")}
    assert {e["step"] for e in fallen} == {0} and min(e["errors"]["forward.a"] for e in fallen) > 0.06
    measured = {row["step"]: set(row["errors"]) for row in run.rows("precision")}
    attention = {f"layers.{i}.attn.{w}" for i in range(2) for w in ("wq", "wk", "wv", "wo")}
    assert {step: its - attention for step, its in measured.items() if step} == {3: set(), 6: set()}, "they are not rounded any more"
    whole = losses(run)
    cut_back(run, 4)
    go(run, corpus, ranks)
    assert losses(run) == whole and {row["step"] for row in run.rows("precision")} == {0, 3, 6}
    assert read_json(list_checkpoints(run.path)[-1] / "trainer.json")["precision"]["wide"] == [e["linear"] for e in fallen]
    write_report(run, corpus)
    assert "Error of rounding, the worst linear" in (run.path / "report.html").read_text()


def test_a_growth_begins_its_scales_anew(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    growth = [{"at_step": 4, "operators": [{"op": "stack"}]}]
    run = run_of(corpus, tmp_path, ranks, precision={"recipe": "fp8_delayed"}, growth=growth)
    scales = read_json(list_checkpoints(run.path)[-1] / "trainer.json")["precision"]["scales"]
    assert [e["step"] for e in run.rows("events") if e["event"] == "scales begin anew"] == [4]
    assert len(scales) == 4 * 7
    assert all(sum(x > 0 for x in past) == 4 for operands in scales.values() for past in operands.values()), "of the four steps after it"


def test_evaluations_before_the_first_step_are_of_the_recipe(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    """The final one is made again after a stop, and says the same; fp32 would say something else."""
    run = run_of(corpus, tmp_path, ranks, precision={"recipe": "mxfp4_quartet"})
    first = run.rows("evaluations")[-1]
    events = [e for e in run.rows("events") if e["event"] != "finished"]
    (run.path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (run.path / "evaluations.jsonl").unlink()
    go(run, corpus, ranks)
    assert run.rows("evaluations")[-1]["loss"] == first["loss"]


def test_what_fell_under_another_recipe_is_forgotten() -> None:
    fallback = Fallback(every=1, error=0.01)
    model = ModelConfig(**MODEL, tied=True)  # type: ignore[arg-type]
    first, same, other = (
        PrecisionState(replace(load_recipe(name), fallback=fallback), model, 0, torch.device("cpu"))
        for name in ("fp4_paper", "fp4_paper", "fp8_rowwise")
    )
    first.fallen = ["layers.0.ffn.w_up"]
    same.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    assert same.fallen == first.fallen and other.fallen == []


def test_the_forward_pass_alone_may_go_wide_at_the_end(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    precision = {"recipe": "nvfp4", "full_precision_last": 0.25}
    run = run_of(corpus, tmp_path, ranks, precision=precision)
    told = [(e["step"], e["recipe"]) for e in run.rows("events") if e["event"] == "precision"]
    assert told == [(0, "nvfp4"), (6, "nvfp4, forward full")]


def test_experts_draw_by_token_wherever_they_are_computed(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "chance.toml").write_text(
        '[quantizers]\nq = { format = "e2m1", rounding = "stochastic" }\n[linears]\nforward = { a = "q", b = "q" }\ndgrad = { a = "q", b = "q" }'
    )
    setting = Setting("moe", recipe=str(tmp_path / "chance.toml"), steps=2)
    alone = conformance.train(setting)
    plan = ParallelPlan(dp_shard=2, ep=2, micro_batch=4)
    split = ranks(2).run(conformance.train, replace(setting, parallel=plan))[0]
    assert_allclose(split.losses[0], alone.losses[0], rtol=1e-7)
    assert_allclose(split.losses, alone.losses, rtol=1e-4)  # after an update a last bit now and then tips a value over its threshold
    assert max(((split.gradients[n] - g).norm() / g.norm().clamp_min(1e-9)).item() for n, g in alone.gradients.items()) < 1e-3
    drawn_otherwise = conformance.train(replace(setting, run=setting.run.model_copy(update={"seed": 7})))
    assert abs(drawn_otherwise.losses[0] - alone.losses[0]) > 1e-4 * alone.losses[0]


def test_products_of_matrix_units_are_refused_where_there_are_none(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(UserError, match=r"set run\.dtype = \"bfloat16\""):
        load_config("quickstart", ["precision.products=hardware", "precision.recipe=fp8_rowwise"])
    run = new_run(corpus, tmp_path, model=MODEL, run={"dtype": "bfloat16"}, precision={"recipe": "fp8_rowwise", "products": "hardware"})
    with pytest.raises(
        Exception, match=r'precision\.products = "hardware": a CPU has no matrix units for eight bits\. Set precision\.products = "auto"'
    ):
        go(run, corpus, ranks)


def test_linears_that_would_be_slower_stay_wide_and_the_others_are_given_to_the_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement is replaced: attention's square linears gain, the FFN's lose; which ranks measure what, and on what device, is hardware.gain's."""
    from regrowth.pretrain import products
    from regrowth.pretrain.attention import Sdpa
    from regrowth.pretrain.model import Transformer

    monkeypatch.setattr(products.hardware, "lacks", lambda device: "")
    monkeypatch.setattr(products.hardware, "gain", lambda tokens, out, into, precision, device: 1.3 if out == into else 0.9)
    model = Transformer(ModelConfig(**MODEL, tied=True), Sdpa())  # type: ignore[arg-type]
    recipe = replace(load_recipe("fp8_rowwise"), last_wide=1)
    slow = products.choose_products([model], recipe, "auto", 2, 128, torch.device("cpu"))
    assert slow == {f"layers.0.ffn.{w}": 0.9 for w in ("w_gate", "w_up", "w_down")}
    given = {name for name, module in model.named_modules() if getattr(module, "hardware", False)}
    assert given == {f"layers.0.attn.{w}" for w in ("wq", "wk", "wv", "wo")}, "the last block is wide"
    assert products.choose_products([model], recipe, "emulated", 2, 128, torch.device("cpu")) == {}
    monkeypatch.setattr(products.hardware, "gain", lambda *_: 1 / 0)  # a run that goes on measures nothing again
    assert products.choose_products([model], recipe, "auto", 2, 128, torch.device("cpu"), chosen=["layers.0.attn.wo"]) == {}
    assert {name for name, module in model.named_modules() if getattr(module, "hardware", False)} == {
        n for n in linear_names(model.config) if n.startswith("layers.0") and n != "layers.0.attn.wo"
    }


def test_the_planner_counts_what_quartets_linears_keep() -> None:
    config = ModelConfig(vocabulary=64, width=64, layers=3, heads=2, kv_heads=1, head_dim=32, ffn_width=128)
    model = build_model(config, torch.device("cpu")).to_empty(device="cpu")
    initialise(dict(model.named_parameters()), config, seed=0)
    x = to_tensors(made_up_batch(0, config.vocabulary, Shape(64, 2)), torch.device("cpu"))
    weights = {weight.data_ptr() for weight in model.parameters()}

    def kept(recipe: str) -> int:
        found: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        model.follow(load_recipe(recipe), 0, 0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x["tokens"], x["positions"], x["doc_ids"], x["labels"], x["loss_weight"])
        return sum(size for size, _ in found.values())

    more = kept("mxfp4_quartet") - kept("full")
    assert more == config.layers * operand_bytes(config, load_recipe("mxfp4_quartet"), 128, 4)
    assert kept("nvfp4") == kept("full") and operand_bytes(config, load_recipe("nvfp4"), 128, 4) == 0
