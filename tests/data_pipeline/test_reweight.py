"""Weights of topics by their losses: the published rule, the same whenever a batch is built and wherever a run was stopped."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.data_pipeline.batch import Batch, split_sample_id
from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.feed import Feed
from regrowth.data_pipeline.loader import Loader
from regrowth.data_pipeline.mixing.config import StaticMixing
from regrowth.data_pipeline.mixing.reweight import Reweight, TopicWeights

CONFIG = LoaderConfig(sequence_length=64, global_batch=8, unit_sequences=2, seed=7, reweight=Reweight(every=3, second_stage=0.25))


def test_the_published_rule_by_hand() -> None:
    weights = TopicWeights(Reweight(every=2, second_stage=0.5), ["a", "b", "c"], update_delay=1, steps=8)
    assert weights.domains(0).tolist() == [1, 1, 1]
    weights.observe(0, {0: 4.0, 1: 2.0}, np.array([1, 3, 0]))
    weights.observe(1, {0: 2.0}, np.array([1, 0, 0]))
    # Means: a (4 + 2) / 2 = 3, b 2; c was not seen. Of the seen topics 2.5.
    assert weights.domains(1).tolist() == [1, 1, 1] and weights.domains(2).tolist() == pytest.approx([3 / 2.5, 1, 1])
    weights.observe(2, {0: 10.0, 2: 1.0}, np.array([1, 0, 1]))
    weights.observe(3, {1: 1.0}, np.array([0, 1, 0]))
    # The last half begins with the update behind step 3: a 1.2 (2 - 10 / 4), at least .1; b and c 2 - 1 / 4.
    assert weights.domains(4).tolist() == pytest.approx([0.1, 1.75, 1.75])


def test_weights_end_where_they_are_bounded_and_what_is_no_number_teaches_nothing() -> None:
    weights = TopicWeights(Reweight(every=1, second_stage=0.0), ["a", "b"], update_delay=1, steps=100)
    for step in range(20):
        weights.observe(step, {0: 6.0, 1: 2.0}, np.array([1, 1]))
    assert weights.domains(21).tolist() == [5, 1]
    weights.observe(20, {0: float("nan"), 1: float("inf")}, np.array([1, 1]))
    assert weights.domains(30).tolist() == [5, 1]


def test_a_domain_of_several_topics_weighs_their_mean() -> None:
    weights = TopicWeights(Reweight(every=1), ["a", "a+b", "b"], update_delay=1, steps=100)
    weights.observe(0, {0: 3.0, 1: 3.0, 2: 1.0}, np.array([1, 1, 1]))
    # a: 3; b: (3 + 1) / 2 = 2; both 2.5.
    assert weights.topics(1) == pytest.approx({"a": 1.2, "b": 1.0})
    assert weights.domains(1).tolist() == pytest.approx([1.2, 1.1, 1.0])


def losses_at(step: int, ids: list[int]) -> dict[int, float]:
    return {d: 2.0 + d - 0.01 * step for d in {split_sample_id(s)[0] for s in ids}}


def trained(corpus: Corpus, config: LoaderConfig, stops: list[int] | None = None, ranks: int = 1) -> list[np.ndarray]:
    """The loss weights of 24 steps of a feed, stopped and begun again after some of them."""
    found = []
    loader = Loader(corpus, config, StaticMixing(weights="uniform"), 24)
    begin = 0
    for end in [*(stops or []), 24]:
        feeds = [Feed(loader, 0, ranks, lambda batch: batch, 24)]
        for step in range(begin, end):
            ids, batch = feeds[0].take(step)
            assert isinstance(batch, Batch)
            found.append(batch.loss_weight.copy())
            loader.observe(step, losses_at(step, ids))
        feeds[0].close()
        state, begin = json.loads(json.dumps(loader.state_dict(end))), end
        loader = Loader(corpus, config, StaticMixing(weights="uniform"), 24)
        loader.load_state_dict(state)
    return found


@settings(max_examples=12, deadline=None)
@given(stops=st.lists(st.integers(1, 23), max_size=3, unique=True), prefetch=st.integers(0, 4), delay=st.integers(1, 5))
def test_neither_prefetch_nor_stops_change_a_weight(corpus: Corpus, stops: list[int], prefetch: int, delay: int) -> None:
    config = CONFIG.model_copy(update={"update_delay": delay})
    plain = trained(corpus, config.model_copy(update={"prefetch": 0}))
    other = trained(corpus, config.model_copy(update={"prefetch": prefetch}), sorted(stops))
    for mine, theirs in zip(plain, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert len({float(row.max()) for row in plain}) > 3, "they do change"


def test_without_the_setting_nothing_weighs(corpus: Corpus) -> None:
    plain = trained(corpus, CONFIG.model_copy(update={"reweight": None}))
    assert all(set(np.unique(row)) <= {0.0, 1.0} for row in plain)
