"""When a run grows, and on which plan it goes on."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from regrowth.data_pipeline.corpus import Corpus
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.ranks import RankError
from regrowth.pretrain.checkpoint import load_plain, verify
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.growth.event import GrowthEvent, Plateau, plan_in_force, waiting
from regrowth.pretrain.lineage import Lineage, Parent
from regrowth.pretrain.run_folder import RunFolder
from tests.pretrain.helpers import Ranks, cut_back, go, losses, new_run

STACK = [{"op": "stack", "factor": 2}]
SHORT = {"run": {"steps": 10}, "checkpoint": {"every": 4, "keep": 10}}


def grown_at(run: RunFolder) -> list[int]:
    return [event["step"] for event in run.rows("events") if event["event"] == "growth"]


def test_a_plateau_is_where_the_mean_of_a_window_hardly_falls() -> None:
    falling, flat = [4.0, 4.2, 3.0, 3.2], [4.0, 4.2, 4.0, 4.1]
    plateau = Plateau(window=2, least_fall=0.05)
    assert not plateau.reached(4, falling) and plateau.reached(4, flat)
    assert not plateau.reached(3, flat[1:]), "two windows are needed"
    assert plateau.reached(6, [9.0, 1.0, *flat]), "the last two windows count"
    assert not Plateau(window=2, least_fall=0.05, not_before=5).reached(4, flat)


def test_events_wait_for_each_other_and_are_known_by_their_moment() -> None:
    events = [
        GrowthEvent.model_validate({**moment, "operators": STACK, "parallel": plan})
        for moment, plan in (({"at_plateau": {"window": 50}}, {"tp": 2}), ({"at_step": 7}, {}), ({"at_tokens": 1e6}, {"tp": 1, "pp": 2}))
    ]
    assert [event.at for event in events] == ["plateau of 50 steps", "step 7", "1e+06 tokens"]
    lineage = Lineage()
    assert waiting(events, lineage) == events and plan_in_force(ParallelPlan(), events, lineage).world_size == 1
    lineage = lineage.grown("a" * 64, events[0].describe())
    assert waiting(events, lineage) == events[1:] and plan_in_force(ParallelPlan(), events, lineage).tp == 2
    twice = [events[0], events[0].model_copy()]
    assert plan_in_force(ParallelPlan(), twice, lineage).tp == 2, "also where the same stands twice"
    lineage = lineage.grown("b" * 64, events[1].describe()).grown("c" * 64, events[2].describe())
    assert not waiting(events, lineage) and plan_in_force(ParallelPlan(), events, lineage).pp == 2
    older = Lineage(parents=[Parent(id="a" * 64, relation="grown from", step=7, operator={"op": "stack"})])
    assert waiting(events[1:2], older) == [], "checkpoints from before there were other moments than steps"
    assert waiting(events, lineage.continued("d" * 64)) == events, "a new run has its own events"


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ({}, "no moment given; name one of at_step, at_tokens and at_plateau"),
        ({"at_step": 2, "at_tokens": 1e5}, "at_step and at_tokens given; name one"),
        ({"at_step": 2, "parallel": {"tq": 2}}, "after the growth at step 2: parallel: unknown key .tq.; did you mean .tp"),
        ({"at_step": 2, "parallel": {"pp": 3}}, "after the growth at step 2: schedule .1f1b. needs at least 3 micro-batches a step"),
        (
            {"at_tokens": 9e4, "parallel": {"cp": 3}},
            "after the growth at 90000 tokens: loader.sequence_length = 64 is not divisible by 2 x",
        ),
        ({"at_step": 10}, "at_step = 10 is not before the end of the run"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_start(event: dict[str, Any], why: str, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        new_run(corpus, tmp_path, growth=[{"operators": STACK, **event}], **SHORT)


def test_initial_weights_can_be_grown(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    run = go(new_run(corpus, tmp_path, growth=[{"at_step": 0, "operators": STACK}], **{**SHORT, "run": {"steps": 2}}), corpus, ranks)
    assert grown_at(run) == [0] and [row["layers"] for row in run.rows("metrics")] == [4, 4]


def test_growth_by_tokens_and_by_a_plateau_goes_on_bit_for_bit_after_a_kill(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    growth = [
        {"at_tokens": 2 * 8 * 64 - 100, "operators": STACK},
        {"at_plateau": {"window": 2, "least_fall": 0.9}, "operators": [{"op": "hyperclone"}]},
    ]
    run = go(new_run(corpus, tmp_path, growth=growth, **SHORT), corpus, ranks)
    assert grown_at(run) == [2, 6], "two steps have more tokens than asked for; four steps later there are two windows of the larger model"
    again = RunFolder(Path(shutil.copytree(run.path, tmp_path / "again")))
    cut_back(again, 4)
    go(again, corpus, ranks)
    assert losses(again) == losses(run)
    assert verify(list_checkpoints(again.path)[-1])["id"] == verify(list_checkpoints(run.path)[-1])["id"]


def test_a_growth_changes_the_plan_in_the_same_processes(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    plain = [{"at_step": 4, "operators": STACK}]
    one = go(new_run(corpus, tmp_path / "one", growth=plain, **SHORT), corpus, ranks)
    changed = [{"at_step": 4, "operators": STACK, "parallel": {"dp_shard": 1, "pp": 2}}]  # four ranks: each mesh makes groups of two
    other = go(
        new_run(corpus, tmp_path / "two", growth=changed, parallel={"dp_shard": 2, "tp": 2, "micro_batch": 2}, **SHORT), corpus, ranks
    )
    assert_allclose(losses(other), losses(one), rtol=1e-5)
    assert other.plan().pp == 2 and not [event for event in other.rows("events") if event["event"] == "replanned"]


def test_a_growth_onto_more_ranks_stops_for_its_launcher_and_goes_on(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    growth = [{"at_step": 4, "operators": STACK, "parallel": {"dp_shard": 2}}]
    one = go(new_run(corpus, tmp_path / "one", growth=[{k: growth[0][k] for k in ("at_step", "operators")}], **SHORT), corpus, ranks)
    run = new_run(corpus, tmp_path / "two", growth=growth, **SHORT)
    with pytest.raises(
        RankError, match=r"after the growth at step 4 the plan needs 2 ranks; these are 1. Go on with: regrowth train --resume"
    ):
        go(run, corpus, ranks)
    assert run.rows("events")[-1]["event"] == "replanned" and run.plan().world_size == 2 and grown_at(run) == [4]
    go(run, corpus, ranks)
    assert_allclose(losses(run), losses(one), rtol=1e-5)
    notes = [(row["step"], row["note"]) for row in run.rows("evaluations") if row["step"] == 4]
    assert notes == [(4, ""), (4, "after growth")], "the grown model is measured by those that go on"


@pytest.mark.slow
def test_random_values_are_faded_in_alike_under_every_plan_and_through_a_kill(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    operators = [{"op": "random_pad", "width": 48, "heads": 4, "kv_heads": 4, "ffn_width": 96, "ramp_steps": 4}]
    settings = {"growth": [{"at_step": 2, "operators": operators}], "run": {"steps": 8}, "checkpoint": {"every": 2, "keep": 20}}
    still = {**settings, "optimizer": {"lr": 1e-12}, "safety": {"skip_sigma": None}}
    one = go(new_run(corpus, tmp_path / "one", **still), corpus, ranks)
    stages = [
        load_plain(one.path / f"checkpoints/{name}")[1] for name in ("step-000002-grown", "step-000004", "step-000006", "step-000008")
    ]
    begin, half, end, later = (weights["layers.1.attn.wo.weight"] for weights in stages)
    new = begin == 0
    assert new.any() and torch.equal(half[~new], end[~new]) and torch.equal(end, later)
    torch.testing.assert_close(half[new] * 2, end[new], rtol=1e-5, atol=1e-9)
    assert end[new].std().item() == pytest.approx(one.config().model.init_std / 2, rel=0.1), "two layers: 1 / sqrt(2 x 2)"
    assert losses(one)[2] == pytest.approx(losses(new_run_without(one, corpus, tmp_path, ranks))[2], rel=1e-5), "at first nothing changes"
    split = go(new_run(corpus, tmp_path / "split", parallel={"tp": 2, "micro_batch": 4}, **settings), corpus, ranks)
    whole = go(new_run(corpus, tmp_path / "whole", **settings), corpus, ranks)
    assert_allclose(losses(split), losses(whole), rtol=1e-5)
    again = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "again")))
    cut_back(again, 4)
    go(again, corpus, ranks)
    assert losses(again) == losses(whole)


def new_run_without(run: RunFolder, corpus: Corpus, tmp_path: Path, ranks: Ranks) -> RunFolder:
    """The same run without its growth."""
    config = run.config()
    sections = {"run": {"steps": 3}, "optimizer": {"lr": config.optimizer.lr}, "safety": {"skip_sigma": None}}
    return go(new_run(corpus, tmp_path / "plain", **sections), corpus, ranks)
