"""The loader reads every sequence of an epoch exactly once, whatever happens in between."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.data_pipeline.batch import split_sample_id
from regrowth.data_pipeline.config import LoaderConfig, OdmMixing, StaticMixing
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.loader import Loader, heldout_batches
from regrowth.errors import UserError

CONFIG = LoaderConfig(sequence_length=64, global_batch=8, unit_sequences=2, seed=7)
ODM = OdmMixing(policy="odm", warmup_steps=2)


def advance(loader: Loader, steps: range) -> list[list[int]]:
    """Run steps with losses that depend on what was drawn."""
    taken = []
    for step in steps:
        ids = loader.plan_step(step)
        domains = {split_sample_id(s)[0] for s in ids}
        loader.mixer.observe(step, {d: 3.0 + 0.5 * d - 0.01 * step for d in domains})
        taken.append(ids)
    return taken


def test_an_epoch_reads_every_token_of_a_domain_once(corpus: Corpus) -> None:
    loader = Loader(corpus, CONFIG, StaticMixing(weights="natural"))
    reader, cursor = loader.readers[0], loader.cursors[0]
    total = sum(reader.counts)
    first, second = reader.take(cursor, total), reader.take(cursor, total)
    assert cursor.epoch == 2 and cursor.position == cursor.offset == 0
    assert len(set(first)) == len(set(second)) == total and not set(first) & set(second)
    expected = collections.Counter(int(t) for shard, n in reader.blocks for t in shard.block(n)[0])
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
    state["identity"] = {**state["identity"], "domains": ["other"], "sequence_length": 128}
    with pytest.raises(UserError, match=r"domains: checkpoint \['other'\].*sequence_length: checkpoint 128, now 64"):
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
        assert loader.epochs()[domain] == pytest.approx((taken == index).sum() / sum(loader.readers[index].counts))
