"""The loader reads every sequence of an epoch exactly once, whatever happens in between."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.data_pipeline.batch import split_sample_id
from regrowth.data_pipeline.config import DataConfig, LoaderConfig
from regrowth.data_pipeline.corpora import open_corpora
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.feed import Feed
from regrowth.data_pipeline.loader import Loader, heldout_batches
from regrowth.data_pipeline.mixing.config import OdmMixing, StaticMixing
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.reader import Cursor
from regrowth.errors import Exhausted, UserError
from tests.conftest import small_data_values

CONFIG = LoaderConfig(sequence_length=64, global_batch=8, unit_sequences=2, seed=7)
ODM = OdmMixing(policy="odm", warmup_steps=2)


def advance(loader: Loader, steps: range) -> list[list[int]]:
    """Run steps with losses that depend on what was drawn."""
    taken = []
    for step in steps:
        ids = loader.plan_step(step)
        domains = {split_sample_id(s)[0] for s in ids}
        loader.observe(step, {d: 3.0 + 0.5 * d - 0.01 * step for d in domains})
        taken.append(ids)
    return taken


def test_an_epoch_reads_every_token_of_a_domain_once(corpus: Corpus) -> None:
    loader = Loader(corpus, CONFIG, StaticMixing(weights="natural"))
    reader, cursor = loader.readers[0], loader.cursors[0]
    total = reader.sequences
    first, second = reader.take(cursor, total), reader.take(cursor, total)
    assert cursor.epoch == 2 and cursor.position == cursor.offset == 0
    assert len(set(first)) == len(set(second)) == total and not set(first) & set(second)
    expected = collections.Counter(
        int(t) for shard in corpus.shards("train", reader.domain) for n in range(len(shard.index.blocks)) for t in shard.block(n)[0]
    )
    for ids in (first, second):
        batch = loader.build(ids)
        assert collections.Counter(batch.tokens[batch.loss_weight > 0].tolist()) == expected
    assert [s & 0x3FFFF for s in first[:20]] != [s & 0x3FFFF for s in second[:20]], "another epoch, another order"


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 60), max_size=4), delay=st.integers(1, 3))
def test_stops_and_resumes_change_nothing(corpus: Corpus, cuts: list[int], delay: int) -> None:
    config = CONFIG.model_copy(update={"update_delay": delay})
    expected = advance(Loader(corpus, config, ODM), range(60))
    got: list[list[int]] = []
    loader = Loader(corpus, config, ODM)
    for end in [*sorted(set(cuts)), 60]:
        got += advance(loader, range(len(got), end))
        state = json.loads(json.dumps(loader.state_dict()))
        loader = Loader(corpus, config, ODM)
        loader.load_state_dict(state)
    assert got == expected


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 4]), st.sampled_from(["natural", "uniform", "odm"])), min_size=1, max_size=6
    )
)
def test_exactly_once_when_ranks_and_policies_change(corpus: Corpus, phases: list[tuple[int, int, str]]) -> None:
    """Each phase may run on another number of ranks with another policy; together they read each domain's stream without gap or repeat."""
    state, step, seen = None, 0, collections.defaultdict(list)
    for steps, ranks, policy in phases:
        mixing = ODM if policy == "odm" else StaticMixing(weights=policy)  # type: ignore[arg-type]
        loader = Loader(corpus, CONFIG, mixing)
        if state:
            state["mixer"] = loader.mixer.state_dict()  # a new policy begins afresh, the cursors go on
            loader.load_state_dict(state)
        for ids in advance(loader, range(step, step + steps)):
            share = len(ids) // ranks
            by_rank = [loader.build(ids[r * share : (r + 1) * share]).sample_id.tolist() for r in range(ranks)]
            for sample in (s for part in by_rank for s in part):
                seen[split_sample_id(sample)[0]].append(sample)
        step += steps
        state = json.loads(json.dumps(loader.state_dict()))
    reference = Loader(corpus, CONFIG, StaticMixing(weights="uniform"))
    for domain, samples in seen.items():
        assert samples == reference.readers[domain].take(reference.cursors[domain], len(samples))


def test_a_state_of_another_corpus_is_refused_with_the_difference(corpus: Corpus) -> None:
    loader = Loader(corpus, CONFIG, ODM)
    state = loader.state_dict()
    state["identity"] = {**state["identity"], "domains": {"other": "1f"}, "sequence_length": 128}
    with pytest.raises(UserError, match=r"sequence_length: checkpoint 128, now 64.*domains: checkpoint \['other'\]"):
        loader.load_state_dict(state)


def test_held_out_sequences_are_the_same_every_time_and_hold_all_the_text(corpus: Corpus) -> None:
    first, second = (heldout_batches(corpus, "prose", 64) for _ in range(2))
    assert (first.tokens == second.tokens).all()
    assert first.loss_weight.sum() == corpus.tokens("heldout", "prose")
    limited = heldout_batches(corpus, "prose", 64, limit=3)
    assert (limited.tokens == first.tokens[:3]).all()


def test_epochs_count_what_was_read(corpus: Corpus) -> None:
    loader = Loader(corpus, CONFIG, StaticMixing(weights="uniform"))
    taken = np.array([split_sample_id(s)[0] for ids in advance(loader, range(20)) for s in ids])
    for index, domain in enumerate(loader.domains):
        assert loader.epochs()[domain] == pytest.approx((taken == index).sum() / loader.readers[index].sequences, rel=0.05)


EVENTS = st.lists(
    st.tuples(
        st.integers(1, 12),  # steps
        st.sampled_from([1, 2, 4]),  # ranks
        st.sampled_from(["natural", "uniform", "odm", "capped"]),
        st.sampled_from([4, 8, 16]),  # sequences a step
        st.integers(0, 3),  # steps that are planned ahead and lost when the phase ends
        st.integers(1, 3),  # delay
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(EVENTS, st.sampled_from(["chunk", "best_fit", "fixed"]))
def test_every_sequence_is_read_once_an_epoch_whatever_changes(corpus: Corpus, phases: list, packing: str) -> None:  # type: ignore[type-arg]
    """Kills with work planned ahead, other ranks, other batches, other weights, other policies, limits on epochs: each domain's stream has no gap and no
    repeat, and so an epoch every sample once."""
    state, step, seen = None, 0, collections.defaultdict(list)
    for steps, ranks, policy, batch, ahead, delay in phases:
        mixing = {"odm": ODM, "capped": StaticMixing(max_epochs=40)}.get(policy) or StaticMixing(weights=policy)
        config = CONFIG.model_copy(update={"global_batch": batch, "packing": packing, "prefetch": ahead, "update_delay": delay})
        loader = Loader(corpus, config, mixing)
        if state:
            loader.load_state_dict(state)
        feeds = [Feed(loader, 0, 1, lambda b: b.sample_id.tolist(), step + steps + ahead)]
        for now in range(step, step + steps):
            ids, samples = feeds[0].take(now)
            assert samples == ids and len(ids) == batch
            share = len(ids) // ranks
            assert [s for r in range(ranks) for s in ids[r * share : (r + 1) * share]] == ids
            for sample in ids:
                seen[split_sample_id(sample)[0]].append(sample)
            loader.observe(now, {split_sample_id(s)[0]: 3.0 + 0.1 * (s % 7) for s in ids})
        step += steps
        feeds[0].close()
        state = json.loads(json.dumps(loader.state_dict(step)))
    reference = Loader(corpus, CONFIG.model_copy(update={"packing": packing}), StaticMixing(weights="uniform"))
    for domain, samples in seen.items():
        reader = reference.readers[domain]
        assert samples == reader.take(reference.cursors[domain], len(samples))
        epoch = collections.Counter(samples[: reader.sequences])
        assert set(epoch.values()) == {1} and len({split_sample_id(s)[1] for s in epoch}) == 1


def test_epochs_end_where_they_are_limited_to_the_sequence(corpus: Corpus) -> None:
    config = CONFIG.model_copy(update={"unit_sequences": 1})
    loader = Loader(corpus, config, StaticMixing(weights={"prose": 0.9, "programs": 0.1}, max_epochs={"prose": 0.5}))
    prose = loader.domains.index("prose")
    half = int(loader.readers[prose].sequences * 0.5)
    taken = [s for ids in advance(loader, range(half // 8 + 30)) for s in ids]
    assert sum(split_sample_id(s)[0] == prose for s in taken) == half
    nothing = Loader(corpus, config, StaticMixing(max_epochs=0.1))
    with pytest.raises(UserError, match=r"that the policy draws has been read as often as mixing\.max_epochs allows"):
        advance(nothing, range(1000))


def test_the_end_of_the_data_is_told_before_the_run_and_else_in_its_turn(corpus: Corpus) -> None:
    config = CONFIG.model_copy(update={"prefetch": 4})
    both = Loader(corpus, config, StaticMixing(max_epochs=0.5), steps=1000)
    can = sum(int(reader.sequences * 0.5) // 2 for reader in both.readers) // 4
    with pytest.raises(Exhausted, match=f"have data for {can} steps together, and the run has 1000.* set run.steps = {can}"):
        both.check_enough()
    enough = Loader(corpus, config, StaticMixing(max_epochs=0.5), steps=can)
    enough.check_enough()
    assert len(advance(enough, range(can))) == can
    Loader(corpus, config, StaticMixing(max_epochs={"prose": 0.5}), steps=1000).check_enough()
    other = int(both.readers[1].sequences * 0.5) // 2 // 4
    lowered = Loader(corpus, config, StaticMixing(max_epochs=0.5), steps=other)
    lowered.cursors[0].taken = 10**6  # a cap that was lowered below what was read of one domain takes nothing from the other
    lowered.check_enough()

    weights = {"prose": 1.0, "programs": 0.0}
    loader = Loader(corpus, config, StaticMixing(weights=weights, max_epochs=0.5), steps=1000)
    last = int(loader.readers[loader.domains.index("prose")].sequences * 0.5) // 2 // 4
    feed = Feed(loader, 0, 1, len, 1000)
    for step in range(last):
        assert feed.take(step)[1] == 8, "what was planned ahead ends nothing"
        loader.observe(step, {0: 1.0})
    for _ in range(2):
        with pytest.raises(Exhausted, match=rf"step {last}: every domain that the policy draws has been read"):
            feed.take(last)
    plain = Loader(corpus, config, StaticMixing(weights=weights, max_epochs=0.5))
    advance(plain, range(last))
    assert loader.state_dict(last)["cursors"] == plain.state_dict()["cursors"], "and the state is that of the last step"
    feed.close()


def test_batches_are_built_ahead_as_far_as_the_mixture_allows(corpus: Corpus) -> None:
    for delay, ahead, expected in ((1, 4, 0), (2, 4, 1), (3, 4, 1), (3, 0, 0)):
        config = CONFIG.model_copy(update={"update_delay": delay, "prefetch": ahead})
        loader = Loader(corpus, config, ODM)
        feed = Feed(loader, 0, 1, lambda batch: batch, 100)
        plain = Loader(corpus, config, ODM)
        for step in range(12):
            ids, batch = feed.take(step)
            assert len(feed._planned) == expected
            assert ids == plain.plan_step(step), "a draw made ahead is the same draw"
            assert (batch.tokens == plain.build(ids).tokens).all()
            losses = {d: 3.0 - 0.1 * step + d for d in {split_sample_id(s)[0] for s in ids}}
            assert loader.observe(step, losses) == plain.observe(step, losses)
            assert loader.state_dict(step + 1) == plain.state_dict(step + 1), "what was planned ahead is not in the state"
        feed.close()
    static = Feed(Loader(corpus, CONFIG.model_copy(update={"update_delay": 1, "prefetch": 4}), StaticMixing()), 0, 1, lambda b: b, 6)
    static.take(0)
    assert len(static._planned) == 4, "one that learns nothing may be asked as early as one likes"
    static.take(1)
    static.take(2)
    assert len(static._planned) == 3, "not beyond the end"
    static.close()


def test_a_damaged_block_stops_the_run_by_name_or_is_skipped_and_counted(documents: Path, tmp_path: Path) -> None:
    corpus = prepare(DataConfig.model_validate(small_data_values(documents, tmp_path)))
    shard = corpus.shards("train", "prose")[0]
    index = shard.index.blocks[1]
    with shard.path.open("r+b") as file:
        file.seek(index.values_offset + 10)
        byte = file.read(1)
        file.seek(index.values_offset + 10)
        file.write(bytes([byte[0] ^ 1]))
    mixing = StaticMixing(weights={"prose": 1.0, "programs": 0.0})
    loader = Loader(corpus, CONFIG, mixing)
    total = loader.readers[loader.domains.index("prose")].sequences
    with pytest.raises(UserError, match=rf"{shard.path.name}: damaged, the tokens of block 1 do not match"):
        for ids in advance(loader, range(total)):
            loader.build(ids)
    skipping = Loader(corpus, CONFIG.model_copy(update={"damaged": "skip", "unit_sequences": 1, "global_batch": 1}), mixing)
    weight = sum(float(skipping.build(ids).loss_weight.sum()) for ids in advance(skipping, range(total)))
    (damage,) = skipping.damage()
    assert (damage.shard, damage.block, damage.tokens) == (str(shard.path), 1, index.tokens) and skipping.damage() == []
    assert weight == corpus.tokens("train", "prose") - index.tokens
    with pytest.raises(ValueError, match='damaged = "skip" needs packing'):
        LoaderConfig(damaged="skip", packing="best_fit")


def test_a_corpus_that_joins_is_read_from_its_beginning_and_the_others_go_on(documents: Path, corpus: Corpus, tmp_path: Path) -> None:
    values = small_data_values(documents, tmp_path) | {"tokenizer": {"path": str(corpus.folder / "tokenizer/tokenizer.json")}}
    values["sources"] = [{"kind": "jsonl", "path": str(documents / "prose.jsonl"), "domain": "more"}]
    other = prepare(DataConfig.model_validate(values))
    loader = Loader(corpus, CONFIG, ODM)
    before = [s for ids in advance(loader, range(10)) for s in ids]
    both = open_corpora(corpus.folder, LoaderConfig(corpora=[str(other.folder)]))
    assert both.domains == sorted([*corpus.domains, "more"])
    joined = Loader(both, CONFIG, ODM)
    joined.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    after = [s for ids in advance(joined, range(10, 40)) for s in ids]
    for name in both.domains:
        index, fresh = both.domains.index(name), Loader(both, CONFIG, ODM)
        old = [s for s in before if name in corpus.domains and split_sample_id(s)[0] == corpus.domains.index(name)]
        new = [s for s in after if split_sample_id(s)[0] == index]
        stream = fresh.readers[index].take(fresh.cursors[index], len(old) + len(new))
        assert [split_sample_id(s)[1:] for s in old + new] == [split_sample_id(s)[1:] for s in stream]
    alone = Loader(corpus, CONFIG, ODM)
    alone.load_state_dict(json.loads(json.dumps(joined.state_dict())))  # and it leaves again
    advance(alone, range(40, 50))
    with pytest.raises(UserError, match=r"both .* have a domain 'programs'"):
        open_corpora(corpus.folder, LoaderConfig(corpora=[str(corpus.folder)]))
    values = small_data_values(documents, tmp_path / "x") | {"tokenizer": {"vocabulary": 300}}
    foreign = prepare(DataConfig.model_validate(values))
    with pytest.raises(UserError, match="another tokenizer"):
        open_corpora(corpus.folder, LoaderConfig(corpora=[str(foreign.folder)]))


def test_a_domain_of_fewer_tokens_than_a_sequence_is_read_as_one_padded_sequence(corpus: Corpus) -> None:
    length = 1 << 15
    loader = Loader(corpus, CONFIG.model_copy(update={"sequence_length": length, "global_batch": 2}), StaticMixing(weights="uniform"))
    ids = loader.plan_step(0)
    batch = loader.build(ids)
    assert batch.tokens.shape == (2, length) and (batch.loss_weight.sum(1) > 0).all()
    assert (batch.doc_ids[batch.loss_weight == 0] == -1).all()


def test_documents_weigh_in_the_loss_by_a_score(documents: Path, tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="needs the curation extra")
    values = small_data_values(documents, tmp_path) | {"shards": {"block_tokens": 4096, "weight": "language"}}
    values["transforms"] = [{"kind": "normalise"}, {"kind": "language"}]
    corpus = prepare(DataConfig.model_validate(values))
    loader = Loader(corpus, CONFIG, StaticMixing())
    for reader in loader.readers:
        expected = 0.0
        for shard in corpus.shards("train", reader.domain):
            shard.verify()
            for number in range(len(shard.index.blocks)):
                table, block = shard.table(number), shard.whole_block(number)
                scores = [row["language"] for row in table["scores"].to_pylist()]
                assert block.weights is not None and block.weights.tolist() == scores == table["weight"].to_pylist()
                expected += float((block.weights * np.diff(block.row_offsets)).sum())
        weights = loader.build(reader.take(Cursor(), reader.sequences)).loss_weight
        assert weights.sum() == pytest.approx(expected, rel=1e-5) and 0 < expected < corpus.tokens("train", reader.domain)
        heldout = heldout_batches(corpus, reader.domain, 64)
        assert heldout.loss_weight.sum() == corpus.tokens("heldout", reader.domain), "held-out text weighs 1"
    fixed = Loader(corpus, CONFIG.model_copy(update={"packing": "fixed"}), StaticMixing())
    with pytest.raises(UserError, match='"fixed" does not tell documents apart'):
        fixed.build(fixed.plan_step(0))
    values["shards"] = {"weight": "langage"}
    with pytest.raises(UserError, match=r'data.shards.weight = langage: no transform .* did you mean "language"'):
        prepare(DataConfig.model_validate(values))
