"""The decision log of real runs: recomputed to the last bit, followed on other plans, explained down to the documents, through changes on the way."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.config import DataConfig, LoaderConfig
from regrowth.data_pipeline.corpora import open_corpora
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.mixing.explain import explain
from regrowth.data_pipeline.mixing.replay import replay
from regrowth.data_pipeline.prepare import prepare
from regrowth.errors import UserError
from regrowth.files import write_text
from regrowth.parallel.ranks import RankError
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.report.mixture import write_mixture
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import to_toml
from tests.conftest import small_data_values
from tests.pretrain.helpers import Ranks, cut_back, go, losses, new_run

ODM = {"policy": "odm", "warmup_steps": 3, "alpha": 0.5}


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> RunFolder:
    """A run of 12 steps with ODM."""
    return go(new_run(corpus, tmp_path_factory.mktemp("runs"), run={"steps": 12}, mixing=ODM), corpus, ranks)


def change(of: RunFolder, **sections: Any) -> None:
    """Change a run's config between two stretches of it."""
    config = of.config()
    values = json.loads(config.model_dump_json())
    for name, section in sections.items():
        values[name] = section if name == "mixing" else {**values[name], **section}
    write_text(of.path / "config.toml", to_toml(type(config).model_validate(values)))


def test_a_log_is_recomputed_to_the_last_bit_and_a_changed_one_is_found_out(finished: RunFolder, tmp_path: Path) -> None:
    found = replay(finished.path)
    assert (found.steps, found.followed, found.first_difference) == (12, 0, None)
    changes = {
        "probabilities": (7, lambda row: row["probabilities"].__setitem__(0, row["probabilities"][0] + 1e-16)),
        "draws": (7, lambda row: row["draws"].__setitem__(0, 1 - row["draws"][0])),
        "losses": (
            9,
            lambda row: row["losses"].update({k: v + 2.0**-16 for k, v in row["losses"].items()}),
        ),  # two steps later, as the delay says
        "cursors": (7, lambda row: row["cursors"][0].__setitem__(3, 1000)),
    }
    for key, (step, alter) in changes.items():
        shutil.copytree(finished.path, copy := tmp_path / key)
        rows = finished.rows("mixing")
        alter(rows[8])  # the first row is the segment: this is step 7
        write_text(copy / "mixing.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        assert f"step {step}" in str(replay(copy).first_difference), key


FOLLOWERS = [
    ({"dp_shard": 2, "micro_batch": 2}, {}),
    pytest.param({"micro_batch": 8}, {}, marks=pytest.mark.slow),
    ({"micro_batch": 4}, {"prefetch": 4, "update_delay": 1}),
]


@pytest.mark.parametrize(("plan", "loader"), FOLLOWERS, ids=["2 ranks", "other micro-batch", "far ahead"])
def test_a_run_follows_another_s_decisions_on_any_plan(
    plan: dict, loader: dict, finished: RunFolder, corpus: Corpus, tmp_path: Path, ranks: Ranks
) -> None:
    mixing = {"policy": "static", "replay_log": str(finished.path)}  # it would draw otherwise by itself
    run = go(new_run(corpus, tmp_path, run={"steps": 12}, mixing=mixing, parallel=plan, loader=loader), corpus, ranks)
    for ours, theirs in zip(run.decisions(), finished.decisions(), strict=True):
        assert all(ours[key] == theirs[key] for key in ("draws", "probabilities", "cursors"))
    assert losses(run) == pytest.approx(losses(finished), rel=1e-5)
    found = replay(run.path)
    assert (found.steps, found.followed, found.first_difference) == (0, 12, None)


def test_a_log_that_does_not_fit_is_refused_with_the_difference(finished: RunFolder, corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    mixing = {"policy": "static", "replay_log": str(finished.path)}
    for sections, told in (
        ({"loader": {"seed": 9, "global_batch": 4}}, "seed: 0 there, 9 here; global_batch: 8 there, 4 here"),
        ({"run": {"steps": 13}}, "has no step 12 .it has 0 to 11.. Set run.steps to at most 12"),
    ):
        with pytest.raises((UserError, RankError), match=told):
            go(new_run(corpus, tmp_path, mixing=mixing, **sections), corpus, ranks)


@pytest.mark.slow
def test_a_policy_learns_from_the_log_it_follows(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    """Left at step 8, it goes on as the run it followed did."""
    constant = {"schedule": {"decay_fraction": 0.0}}
    finished = go(new_run(corpus, tmp_path / "followed", run={"steps": 12}, mixing=ODM, **constant), corpus, ranks)
    mixing = {**ODM, "replay_log": str(finished.path)}
    run = go(new_run(corpus, tmp_path, run={"steps": 8}, mixing=mixing, loader={"prefetch": 3}, **constant), corpus, ranks)
    change(run, run={"steps": 12}, mixing=ODM)
    go(run, corpus, ranks)
    assert [row["draws"] for row in run.decisions()] == [row["draws"] for row in finished.decisions()]
    found = replay(run.path)
    assert (found.steps, found.followed, found.first_difference) == (4, 8, None)


@pytest.mark.slow
def test_the_delay_of_losses_may_change_on_resume(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    run = go(new_run(corpus, tmp_path, run={"steps": 6}, mixing=ODM, schedule={"decay_fraction": 0.0}), corpus, ranks)
    change(run, run={"steps": 12}, loader={"update_delay": 3})
    go(run, corpus, ranks)
    found = replay(run.path)
    assert (found.steps, found.first_difference) == (12, None)


def test_a_run_that_reads_all_it_may_keeps_what_it_trained(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    mixing = {"policy": "static", "weights": {"prose": 1.0, "programs": 0.0}, "max_epochs": {"prose": 0.08}}
    run = new_run(corpus, tmp_path, run={"steps": 500}, mixing=mixing, loader={"prefetch": 3}, parallel={"dp_shard": 2, "micro_batch": 4})
    with pytest.raises(RankError, match=r"every domain that the policy draws has been read"):
        go(run, corpus, ranks)
    steps = len(run.rows("metrics"))
    assert 0 < steps < 500 and steps % 4 and list_checkpoints(run.path)[-1].name == f"step-{steps:06d}"


def test_tokens_are_counted_and_not_weighed(documents: Path, tmp_path: Path, ranks: Ranks) -> None:
    pytest.importorskip("py3langid", reason="needs the curation extra")
    values = small_data_values(documents, tmp_path) | {"shards": {"block_tokens": 4096, "weight": "language"}}
    corpus = prepare(DataConfig.model_validate({**values, "transforms": [{"kind": "normalise"}, {"kind": "language"}]}))
    run = go(new_run(corpus, tmp_path, run={"steps": 2}, parallel={"dp_shard": 2, "micro_batch": 4}), corpus, ranks)
    for step, row in enumerate(run.rows("metrics")):
        assert row["tokens"] == sum(d.end - d.begin for d in explain(run.path, corpus, step).documents)


def test_topics_weigh_alike_on_every_plan_and_after_a_stop(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    """The weights follow from losses, which two ranks add up in another order: 1e-6 relative; on one plan a stop changes no bit."""
    settings = {"run": {"steps": 8}, "loader": {"reweight": {"every": 2}}, "checkpoint": {"every": 4}}
    one = go(new_run(corpus, tmp_path, **settings), corpus, ranks)
    two = go(new_run(corpus, tmp_path, **settings, parallel={"dp_shard": 2, "micro_batch": 2}), corpus, ranks)
    plain = go(new_run(corpus, tmp_path, run={"steps": 8}), corpus, ranks)
    assert losses(one) == pytest.approx(losses(two), rel=1e-6)
    assert losses(one)[:3] == losses(plain)[:3] and losses(one)[5:] != pytest.approx(losses(plain)[5:], rel=1e-6)
    weights = [row["topic_weights"] for row in one.decisions()]
    assert weights[0] == {"programs": 1.0, "prose": 1.0} and max(weights[-1].values()) > 1
    before = losses(one)
    cut_back(one, 4)
    go(one, corpus, ranks)
    assert losses(one) == before and [row["topic_weights"] for row in one.decisions()] == weights
    assert replay(one.path).first_difference is None


def test_a_step_is_explained_by_the_documents_that_were_in_it(finished: RunFolder, corpus: Corpus) -> None:
    row = finished.decisions()[5]
    read = explain(finished.path, corpus, 5)
    assert len({d.place for d in read.documents}) == 8 == len(row["draws"]) * 2
    by_domain = Counter(d.domain for d in {(d.place, d.domain): d for d in read.documents}.values())
    assert by_domain == {corpus.domains[i]: 2 * row["draws"].count(i) for i in set(row["draws"])}
    tokens = finished.rows("metrics")[5]["tokens"]
    assert sum(d.end - d.begin for d in read.documents) == tokens == sum(read.sources.values())
    originals = {}
    for domain in corpus.domains:
        for shard in corpus.shards("train", domain):
            for number in range(len(shard.index.blocks)):
                table = shard.table(number)
                originals |= {
                    i: corpus.tokenizer.decode(t) for i, t in zip(table["id"].to_pylist(), table["tokens"].to_pylist(), strict=True)
                }
    for document in read.documents:
        assert document.text in originals[document.id], "the text is the document's"
        assert document.source.split("@")[0].endswith(("prose.jsonl", "programs.jsonl"))
        assert (corpus.folder / document.shard).exists()
    with pytest.raises(UserError, match="has no step 99; it has 0 to 11"):
        explain(finished.path, corpus, 99)


def test_weights_and_domains_change_on_the_way(documents: Path, corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    """ODM; then a table; then a corpus joins and ODM again: all effective at the step of the resume, logged, exactly once and recomputable."""
    run = go(new_run(corpus, tmp_path, run={"steps": 6}, mixing=ODM, checkpoint={"every": 3}), corpus, ranks)
    change(run, run={"steps": 10}, mixing={"policy": "static", "weights": {"prose": 0.2, "programs": 0.8}})
    go(run, corpus, ranks)
    values = small_data_values(documents, tmp_path) | {"tokenizer": {"path": str(corpus.folder / "tokenizer/tokenizer.json")}}
    values["sources"] = [{"kind": "jsonl", "path": str(documents / "prose.jsonl"), "domain": "more"}]
    other = prepare(DataConfig.model_validate(values))
    change(run, run={"steps": 16}, loader={"corpora": [str(other.folder)]}, mixing=ODM)
    go(run, corpus, ranks)
    rows = run.decisions()
    assert [row["step"] for row in rows] == list(range(16))
    assert [len(row["probabilities"]) for row in rows] == [2] * 10 + [3] * 6
    assert rows[6]["probabilities"] == [0.8, 0.2], "domains are in alphabetical order"
    changes = [(e["step"], e["policy"], e["domains"]) for e in run.rows("events") if e["event"] == "mixture"]
    assert changes == [(6, "static", 2), (10, "odm", 3)]
    found = replay(run.path)
    assert (found.steps, found.first_difference) == (16, None)
    for mine, theirs in ((0, 1), (1, 2)):  # programs and prose, whose numbers moved
        before, after = rows[9], rows[10]
        assert after["cursors"][theirs][3] == before["cursors"][mine][3] + 2 * before["draws"].count(mine)
    both = open_corpora(corpus.folder, LoaderConfig(corpora=[str(other.folder)]))
    assert {d.domain for step in range(10, 16) for d in explain(run.path, both, step).documents} <= set(both.domains)
    with pytest.raises(UserError, match="not the corpus that step 12"):
        explain(run.path, corpus, 12)
    page = write_mixture(run.path, tmp_path / "mixture.html").read_text()
    assert page.count("<svg") == 4 and "more" in page and "<script" in page


def test_shorter_sequences_first_read_the_same_tokens(corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    """The order of the data and the tokens of a step do not depend on the schedule of lengths."""
    plain = go(new_run(corpus, tmp_path, run={"steps": 6}), corpus, ranks)
    stages = [{"at_step": 0, "sequence_length": 16}, {"at_step": 2, "sequence_length": 32}, {"at_step": 4, "sequence_length": 64}]
    one = go(new_run(corpus, tmp_path, run={"steps": 6}, loader={"length_schedule": stages}), corpus, ranks)
    two = go(
        new_run(corpus, tmp_path, run={"steps": 6}, loader={"length_schedule": stages}, parallel={"dp_shard": 2, "micro_batch": 2}),
        corpus,
        ranks,
    )
    assert [r["cursors"] for r in one.decisions()] == [r["cursors"] for r in plain.decisions()]
    assert [r["tokens"] for r in one.rows("metrics")] == [r["tokens"] for r in plain.rows("metrics")]
    assert losses(one) == pytest.approx(losses(two), rel=1e-6)
    assert losses(one)[0] != pytest.approx(losses(plain)[0], rel=1e-6)


def test_a_damaged_block_is_passed_over_and_named_in_the_run(documents: Path, tmp_path: Path, ranks: Ranks) -> None:
    corpus = prepare(DataConfig.model_validate(small_data_values(documents, tmp_path)))
    shard = corpus.shards("train", "prose")[0]
    with shard.path.open("r+b") as file:
        file.seek(shard.index.blocks[0].values_offset)
        file.write(b"\xff\x00\xff\x00")
    steps = corpus.tokens("train", "prose") // (64 * 8) + 2  # one epoch
    mixing = {"policy": "static", "weights": {"prose": 1.0, "programs": 0.0}}
    run = new_run(
        corpus, tmp_path, run={"steps": steps}, mixing=mixing, loader={"damaged": "skip"}, parallel={"dp_shard": 2, "micro_batch": 4}
    )
    go(run, corpus, ranks)
    named = run.rows("damaged")
    assert (
        named
        and {(row["shard"], row["block"]) for row in named} == {(str(shard.path), 0)}
        and named[0]["tokens"] == shard.index.blocks[0].tokens
    )
    assert len(run.rows("metrics")) == steps


def test_lengths_that_do_not_fit_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    stages = {"length_schedule": [{"at_step": 0, "sequence_length": 16}]}
    for sections, told in (
        ({"loader": {"length_schedule": [{"at_step": 0, "sequence_length": 24}]}}, "24 at step 0 does not divide sequence_length = 64"),
        ({"loader": stages, "parallel": {"pp": 2}}, "set parallel.pp = 1"),
        ({"loader": {"length_schedule": [{"at_step": 3, "sequence_length": 8}, {"at_step": 2, "sequence_length": 16}]}}, "ascending order"),
    ):
        with pytest.raises(ValueError, match=told):
            new_run(corpus, tmp_path, **sections)
