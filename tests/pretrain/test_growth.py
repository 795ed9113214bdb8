"""Growth: the target's every tensor comes from where the operator says, and a run goes on from it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import UserError
from regrowth.pretrain.checkpoint import load_plain, read_state, save_checkpoint, verify
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.evaluate import heldout
from regrowth.pretrain.growth import grow as grow_module
from regrowth.pretrain.growth.average import average_checkpoints, shares
from regrowth.pretrain.growth.depth import Stack
from regrowth.pretrain.growth.grow import grow_checkpoint
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.plan import GrowthPlan, plan_of
from regrowth.pretrain.growth.probe import probe
from regrowth.pretrain.lineage import Lineage, Parent, read_lineage
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.precision import load_recipe
from regrowth.pretrain.precision_state import PrecisionState
from regrowth.pretrain.report.build import write_report
from regrowth.pretrain.report.lineage_graph import lineage_svg
from regrowth.pretrain.run_folder import RunFolder
from tests.pretrain.helpers import Ranks, go, losses, new_run

GROWING = {
    "growth": [{"at_step": 6, "operators": [{"op": "stack", "factor": 2}]}],
    "run": {"steps": 12},
    "checkpoint": {"every": 4, "keep": 10},
}


@pytest.fixture(scope="module")
def grown(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> RunFolder:
    """A run that was grown before step 6, on two sharded ranks."""
    return go(new_run(corpus, tmp_path_factory.mktemp("runs"), parallel={"dp_shard": 2, "micro_batch": 2}, **GROWING), corpus, ranks)


def test_stacking_six_layers_to_twenty_four_repeats_them_in_order() -> None:
    config, stack = ModelConfig(layers=6), Stack(factor=4)
    assert stack.grow_config(config).layers == 24
    assert [layer for layer, _ in stack.sources(6)] == [0, 1, 2, 3, 4, 5] * 4
    assert [layer for layer, _ in Stack(layers=8).sources(6)] == [0, 1, 2, 3, 4, 5, 0, 1], "also where it does not come out even"
    for name in ("embed.weight", "norm.weight", "head.weight"):
        (term,) = stack.terms(TensorName.parse(name), config, stack.grow_config(config))
        assert str(term.source) == name
    assert str(TensorName.parse("layers.11.ffn.w_up.weight").at_layer(3)) == "layers.3.ffn.w_up.weight"


def test_weights_and_moments_are_stacked_bit_for_bit(grown: RunFolder) -> None:
    small, weights, moments = load_plain(grown.path / "checkpoints/step-000006")
    large, new_weights, new_moments = load_plain(grown.path / "checkpoints/step-000006-grown")
    assert (small.model.layers, large.model.layers) == (2, 4)
    assert sum(t.numel() for t in new_weights.values()) == large.model.parameters
    for name, tensor in new_weights.items():
        source = name
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            source = f"layers.{int(layer) % 2}.{rest}"
        assert torch.equal(tensor, weights[source])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(new_moments[f"{name}.{moment}"], moments[f"{source}.{moment}"])
    assert large.loader == small.loader and large.trainer == {**small.trainer, "guard": {}}, "the smaller model's losses are no measure"


def test_growth_is_in_the_log_the_lineage_and_the_schedule(grown: RunFolder) -> None:
    (event,) = [e for e in grown.rows("events") if e["event"] == "growth"]
    assert event["step"] == 6 and event["op"] == "stack" and event["layers"] == [2, 4]
    rows = grown.rows("metrics")
    assert [row["layers"] for row in rows] == [2] * 6 + [4] * 6
    assert rows[6]["lr"] == pytest.approx(rows[5]["lr"] / 2) and rows[7]["lr"] == pytest.approx(rows[5]["lr"]), "re-warmed over 2 steps"
    state, _, _ = load_plain(list_checkpoints(grown.path)[-1])
    (parent,) = state.lineage.parents
    assert parent.id == verify(grown.path / "checkpoints/step-000006")["id"]
    assert parent.operator["operators"] == [{"op": "stack", "factor": 2, "zero_copies": False}] and parent.operator["layers"] == [2, 4]
    assert "grown by stack" in "\n".join(state.lineage.lines())
    small, large = (c.train_flops_per_token(64) for c in (state.model.model_copy(update={"layers": 2}), state.model))
    tokens = [row["tokens"] for row in rows]
    assert state.lineage.train_flops == pytest.approx(sum(tokens[:6]) * small + sum(tokens[6:]) * large)


def test_the_grown_run_learns_on(grown: RunFolder) -> None:
    assert losses(grown)[-1] < losses(grown)[5]


@pytest.mark.parametrize(
    "left",
    [
        pytest.param("step-000004", marks=pytest.mark.slow),
        "step-000006",
        "step-000006-grown",
        pytest.param("step-000008", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_anywhere_around_its_growth_goes_on_bit_for_bit(
    left: str, grown: RunFolder, corpus: Corpus, tmp_path: Path, ranks: Ranks
) -> None:
    run = RunFolder(Path(shutil.copytree(grown.path, tmp_path / "run")))
    names = [p.name for p in list_checkpoints(run.path)]
    for name in names[names.index(left) + 1 :]:
        shutil.rmtree(run.path / "checkpoints" / name)
    events = [e for e in run.rows("events") if e["event"] != "finished"]
    (run.path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    go(run, corpus, ranks)
    assert losses(run) == losses(grown)
    assert verify(list_checkpoints(run.path)[-1])["id"] == verify(list_checkpoints(grown.path)[-1])["id"]


def test_a_damaged_grown_checkpoint_is_grown_again(grown: RunFolder, corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    run = RunFolder(Path(shutil.copytree(grown.path, tmp_path / "run")))
    for name in ("step-000008", "step-000012"):
        shutil.rmtree(run.path / "checkpoints" / name)
    (run.path / "checkpoints/step-000006-grown/model.json").write_text("{}")
    events = [e for e in run.rows("events") if e["event"] != "finished"]
    (run.path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    go(run, corpus, ranks)
    assert losses(run) == losses(grown)
    assert any(e["event"] == "checkpoint refused" and "step-000006-grown" in e["reason"] for e in run.rows("events"))


def test_growing_offline_is_the_same_as_growing_in_the_run(grown: RunFolder, tmp_path: Path) -> None:
    grow_checkpoint(grown.path / "checkpoints/step-000006", tmp_path / "out", GrowthPlan())
    assert verify(tmp_path / "out")["id"] == verify(grown.path / "checkpoints/step-000006-grown")["id"]
    with pytest.raises(UserError, match="growing never overwrites"):
        grow_checkpoint(grown.path / "checkpoints/step-000006", tmp_path / "out", GrowthPlan())


def test_a_checkpoint_without_moments_grows_where_they_begin_at_zero(grown: RunFolder, tmp_path: Path) -> None:
    state, weights, _ = load_plain(grown.path / "checkpoints/step-000006")
    save_checkpoint(tmp_path / "bare", weights, {}, state, alone=True)
    with pytest.raises(
        UserError, match=r'there is no tensor .*exp_avg.* in this checkpoint. Grow it without the optimizer.s state: moments = "zero"'
    ):
        grow_checkpoint(tmp_path / "bare", tmp_path / "not", GrowthPlan())
    grow_checkpoint(tmp_path / "bare", tmp_path / "out", GrowthPlan(moments="zero"))
    assert all((tensor == 0).all() for tensor in load_plain(tmp_path / "out")[2].values())


def test_a_growth_onto_sizes_that_the_precision_does_not_take_is_refused_before_the_start(corpus: Corpus, tmp_path: Path) -> None:
    fits = {
        "model": {"width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32, "ffn_width": 128},
        "loader": {"sequence_length": 128},
        "precision": {"recipe": "fp4_paper_block"},
    }
    growth = [{"at_step": 2, "operators": [{"op": "zero_pad", "ffn_width": 192}]}]
    with pytest.raises(
        ValueError, match=r"after the growth at step 2: model.ffn_width / parallel.tp = 192 is not a multiple of the precision recipe"
    ):
        new_run(corpus, tmp_path, growth=growth, **fits)
    new_run(corpus, tmp_path, growth=[{"at_step": 2, "operators": [{"op": "zero_pad", "ffn_width": 256}]}], **fits)


def test_what_low_precision_learned_of_a_linear_is_its_descendants(grown: RunFolder, tmp_path: Path) -> None:
    state, weights, moments = load_plain(grown.path / "checkpoints/step-000006")
    past = {"forward.a": [3.0, 2.0], "dgrad.a": [0.5]}
    remembered = {
        "recipe": "fp8_delayed",
        "wide": ["layers.1.attn.wo"],
        "slow": ["layers.0.attn.wq"],
        "scales": {"layers.0.ffn.w_up": past},
    }
    learned = replace(state, trainer={**state.trainer, "precision": remembered})
    save_checkpoint(tmp_path / "learned", weights, moments, learned, alone=True)
    layers = learned.model.layers
    chain = [{"op": "stack"}, {"op": "upcycle", "experts": 2}]
    reset = grow_checkpoint(tmp_path / "learned", tmp_path / "reset", GrowthPlan())
    carried = grow_checkpoint(
        tmp_path / "learned", tmp_path / "carried", GrowthPlan.model_validate({"operators": chain, "scales": "carry"})
    )
    wide = ["layers.1.attn.wo", f"layers.{1 + layers}.attn.wo"]
    assert reset.trainer["precision"] == {"recipe": "fp8_delayed", "wide": wide}, "where products are slower is measured again"
    assert carried.trainer["precision"] == {
        "recipe": "fp8_delayed", "wide": wide, "scales": {f"layers.{layer}.ffn.experts.w_up": past for layer in (0, layers)},
    }  # fmt: skip
    again = PrecisionState(load_recipe("fp8_delayed"), carried.model, 0, torch.device("cpu"))
    again.load_state_dict(read_state(tmp_path / "carried").trainer["precision"])
    assert again.fallen == wide and not again.begins_anew
    assert again.state_dict()["scales"][f"layers.{layers}.ffn.experts.w_up"]["forward.a"][:2] == [3.0, 2.0]
    assert "precision" not in read_state(grown.path / "checkpoints/step-000006").trainer, "nothing was learned there"


def test_several_workers_and_a_growth_that_was_killed_come_to_the_same(
    grown: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = grown.path / "checkpoints/step-000006"
    plan = plan_of({"op": "hyperclone", "noise": 0.1}, "here")
    grow_checkpoint(source, tmp_path / "one", plan)
    monkeypatch.setattr(grow_module, "_FILE_BYTES", 20_000)  # many files
    told: list[tuple[int, int]] = []

    def die(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(source, tmp_path / "two", plan, progress=die)
    assert not (tmp_path / "two").exists() and len(list((tmp_path / ".two.growing").glob("*/*.done"))) == 3
    written: list[Path] = []
    write = grow_module.write_safetensors
    monkeypatch.setattr(grow_module, "write_safetensors", lambda path, *rest: written.append(path) or write(path, *rest))
    told.clear()
    grow_checkpoint(source, tmp_path / "two", plan, progress=lambda done, total: told.append((done, total)))
    files = list((tmp_path / "two").glob("*/*.safetensors"))
    assert len(files) > 8 and len(written) == len(files) - 3 and told[-1][0] == told[-1][1]
    assert verify(tmp_path / "two")["id"] == verify(tmp_path / "one")["id"], "and whatever the files"
    assert not list(tmp_path.glob(".two*")) and not list((tmp_path / "two").glob("*/*.done"))
    monkeypatch.setattr(grow_module, "write_safetensors", write)
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(source, tmp_path / "three", plan_of({"op": "stack"}, "here"), progress=die)
    grow_checkpoint(source, tmp_path / "three", plan)
    assert verify(tmp_path / "three")["id"] == verify(tmp_path / "one")["id"], "what another growth left is not taken for this one's"


def test_a_look_at_real_text_tells_a_function_that_stays_from_one_that_does_not(grown: RunFolder, corpus: Corpus, tmp_path: Path) -> None:
    source, batch = grown.path / "checkpoints/step-000006", heldout(corpus, 64, 2)
    for op, stays in (("hyperclone", True), ("stack", False)):
        grow_checkpoint(source, tmp_path / op, plan_of({"op": op}, "here"))
        found = probe(source, tmp_path / op, batch)
        assert found.holds is stays and found.tokens == (batch.doc_ids >= 0).sum()
        assert found.deviation < 1e-4 if stays else found.deviation > 0.1


@pytest.mark.slow
def test_workers_in_processes(grown: RunFolder, tmp_path: Path) -> None:
    source = grown.path / "checkpoints/step-000006"
    grow_checkpoint(source, tmp_path / "two", GrowthPlan(), workers=2)
    assert verify(tmp_path / "two")["id"] == verify(grown.path / "checkpoints/step-000006-grown")["id"]


@pytest.mark.parametrize(("kind", "expected"), [("uniform", [1 / 3, 1 / 3, 1 / 3]), ("ema", [0.25, 0.25, 0.5])])
def test_checkpoints_are_averaged(kind: Any, expected: list[float], grown: RunFolder, tmp_path: Path) -> None:
    sources = [grown.path / f"checkpoints/{name}" for name in ("step-000006-grown", "step-000008", "step-000012")]
    assert shares(kind, 3, 0.5) == pytest.approx(expected)
    average_checkpoints(sources, tmp_path / "mean", kind, 0.5)
    state, weights, moments = load_plain(tmp_path / "mean")
    whole = [load_plain(path) for path in sources]
    for name, tensor in weights.items():
        assert_allclose(tensor, sum(share * w[name] for share, (_, w, _) in zip(expected, whole, strict=True)), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(moments[name], whole[-1][2][name]) for name in moments) and state.loader == whole[-1][0].loader
    told = "\n".join(state.lineage.lines())
    assert told.count(f"averaged by {kind} average (weight") == 3 and "grown by stack" in told
    for paths, why in (
        (sources[:1], "1 checkpoint given; name two or more"),
        ([grown.path / "checkpoints/step-000006", sources[0]], "its model has another shape or config"),
    ):
        with pytest.raises(UserError, match=why):
            average_checkpoints(paths, tmp_path / "not")
    with pytest.raises(UserError, match="averaging never overwrites"):
        average_checkpoints(sources, tmp_path / "mean")


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(UserError, match=r'op = "stak": no such op; did you mean "stack"\?'):
        plan_of({"op": "stak"}, "here")


def test_a_run_grows_under_any_plan_as_on_one_process(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    one = go(new_run(corpus, tmp_path / "one", **GROWING), corpus, ranks)
    split = go(new_run(corpus, tmp_path / "split", parallel={"pp": 2, "tp": 2, "micro_batch": 4}, **GROWING), corpus, ranks)
    assert_allclose(losses(split), losses(one), rtol=1e-6)
    assert [row["layers"] for row in split.rows("metrics")] == [2] * 6 + [4] * 6


def test_a_plan_that_the_grown_model_does_not_fit_is_refused_before_the_start(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"after the growth at step 6: parallel.stage_layers sums to 2, model.layers is 4"):
        new_run(corpus, tmp_path, parallel={"pp": 2, "stage_layers": [1, 1], "micro_batch": 4}, **GROWING)


def test_the_report_draws_the_lineage_with_what_was_sunk(grown: RunFolder, tmp_path: Path) -> None:
    lineage = read_lineage(grown.path / "checkpoints/step-000012")
    (parent,) = lineage.parents
    assert 0 < parent.tokens < lineage.tokens and 0 < parent.train_flops < lineage.train_flops / 2
    html = write_report(grown, None).read_text()
    assert f"training FLOPs, {parent.train_flops / lineage.train_flops:.0%} of them sunk in ancestors" in html
    assert f"{parent.id[:12]} · step 6" in html and "grown by stack" in html and "this checkpoint · step 12" in html
    assert lineage_svg(Lineage()) == ""
    mean = Lineage(
        parents=[Parent(id=c * 64, relation="averaged from", step=i, train_flops=1e9) for i, c in enumerate("ab")], train_flops=2e9
    )
    drawn = lineage_svg(mean.grown("c" * 64, {"op": "stack"}))
    assert drawn.count("<rect") == 2 * 4 and drawn.count("<line") == 3, "the averaged ones side by side, then the chain"
