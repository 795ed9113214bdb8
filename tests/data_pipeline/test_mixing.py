"""Policies are held to their published formulas, and draws to their probabilities."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from pydantic import ValidationError

from regrowth.data_pipeline.mixing.bandits import OnlineDataMixing
from regrowth.data_pipeline.mixing.build import build_policy
from regrowth.data_pipeline.mixing.config import OdmMixing, StaticMixing
from regrowth.data_pipeline.mixing.mixer import Mixer
from regrowth.data_pipeline.mixing.policy import Static, resolve_weights
from regrowth.errors import UserError

# Losses per step of three domains; a domain that was not drawn is absent. The expected values were computed independently of this code.
LOSSES = [{0: 3.0, 1: 2.5, 2: 2.0}, {0: 2.9, 2: 2.1}, {1: 2.4}, {0: 2.8, 1: 2.3, 2: 2.0}]


def test_odm_in_paper_form_gives_the_published_formula_s_values() -> None:
    odm = OnlineDataMixing(np.array([0.5, 0.3, 0.2]), "paper", alpha=0.9, warmup_steps=3, initial_reward="zero")
    for _ in range(3):
        odm.update({0: 9.0, 1: 9.0, 2: 9.0}, odm.probabilities(0))  # a warm-up whose losses count nothing
    rewards = [(0.6, 0.83333, 1), (1.4156, 0.83333, 1.52634), (1.4156, 1.48724, 1.52634), (2.11762, 2.02801, 1.97161)]
    epsilons = [0.302574, 0.27063, 0.247051, 0.228724]
    shares = [(0.331201, 0.333516, 0.335284), (0.336116, 0.325538, 0.338347), (0.331919, 0.33358, 0.334501), (0.335371, 0.333036, 0.331593)]
    for losses, reward, epsilon, share in zip(LOSSES, rewards, epsilons, shares, strict=True):
        odm.update(losses, odm.probabilities(0))
        assert_allclose(odm.rewards, reward, atol=6e-6)
        assert odm.epsilon(odm.step) == pytest.approx(epsilon, abs=6e-7)
        assert_allclose(odm.probabilities(0), share, atol=6e-7)


def test_odm_in_released_form_gives_the_released_code_s_values() -> None:
    odm = OnlineDataMixing(np.array([0.5, 0.3, 0.2]), "released", alpha=0.5, warmup_steps=2000, initial_reward="zero")
    for _ in range(2000):
        odm.update({0: 9.0}, odm.probabilities(0))
    shares = [(0.499453, 0.308257, 0.19229), (0.53155, 0.237179, 0.231271), (0.48688, 0.300628, 0.212493), (0.483265, 0.298434, 0.218301)]
    for losses, share in zip(LOSSES, shares, strict=True):
        odm.update(losses, odm.probabilities(0))
        assert_allclose(odm.probabilities(0), share, atol=6e-7)


def test_odm_is_uniform_until_k_ln_k_steps() -> None:
    k = 22
    odm = OnlineDataMixing(np.full(k, 1 / k), "paper", 0.9, 0, "zero")
    rng = np.random.default_rng(0)
    for step in range(1, 80):
        odm.update({int(d): float(rng.uniform(2, 4)) for d in rng.integers(0, k, 6)}, odm.probabilities(0))
        uniform = np.allclose(odm.probabilities(0), 1 / k, atol=1e-12)
        assert uniform == (step <= math.floor(k * math.log(k))), step
    assert odm.epsilon(2001) == pytest.approx(0.0083795, abs=1e-7)


def test_odm_starts_from_the_first_loss_where_asked_and_survives_nan_and_one_domain() -> None:
    odm = OnlineDataMixing(np.array([0.5, 0.5]), "paper", 0.9, 2, "first_loss")
    odm.update({0: 3.0, 1: math.nan}, odm.probabilities(0))
    assert odm.rewards == [6.0, 0.0]
    odm.update({1: 4.0, 0: math.inf}, odm.probabilities(0))
    assert odm.rewards == [6.0, 8.0]
    alone = OnlineDataMixing(np.ones(1), "paper", 0.9, 0, "zero")
    alone.update({0: 3.0}, alone.probabilities(0))
    assert alone.probabilities(0).tolist() == [1.0]


def test_a_restored_mixer_draws_what_the_undisturbed_one_draws() -> None:
    def make() -> Mixer:
        policy = build_policy(OdmMixing(policy="odm", warmup_steps=1), ["a", "b", "c"], [10, 20, 70])
        return Mixer(policy, ["a", "b", "c"], units=4, update_delay=2, seed=5)

    def go(mixer: Mixer, steps: range) -> list[list[int]]:
        drawn = []
        for step in steps:
            domains = mixer.draw(step)
            mixer.observe(step, {int(d): 3.0 + 0.1 * int(d) + 0.01 * step for d in set(domains.tolist())})
            drawn.append(domains.tolist())
        return drawn

    whole = make()
    expected = go(whole, range(60))
    first, second = make(), make()
    got = go(first, range(31))
    import json

    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + go(second, range(31, 60)) == expected
    assert second.policy.probabilities(0).tolist() == whole.policy.probabilities(0).tolist()


def test_the_policy_learns_of_a_loss_after_the_delay_and_not_before() -> None:
    class Spy(Static):
        def __init__(self) -> None:
            super().__init__(np.array([0.5, 0.5]))
            self.seen: list[float] = []

        def update(self, losses: dict[int, float], drawn_with: np.ndarray, counts: np.ndarray | None = None) -> None:
            self.seen.append(next(iter(losses.values())))

    for delay in (1, 3):
        spy = Spy()
        mixer = Mixer(spy, ["a", "b"], 2, delay, 0)
        for step in range(6):
            mixer.draw(step)
            assert len(spy.seen) == max(0, step - delay + 1), "what a draw may know"
            mixer.observe(step, {0: float(step)})
        assert spy.seen == [float(s) for s in range(6 - delay)]


def test_draws_follow_the_probabilities() -> None:
    weights = np.array([0.1, 0.6, 0.3])
    mixer = Mixer(Static(weights), ["a", "b", "c"], units=50, update_delay=1, seed=0)
    drawn = np.concatenate([mixer.draw(step) for step in range(200)])
    counts = np.bincount(drawn, minlength=3)
    assert ((counts - 10_000 * weights) ** 2 / (10_000 * weights)).sum() < 13.8  # chi-square, 2 degrees of freedom, 0.1%


def test_weights_are_checked() -> None:
    for bad in ({"a": 0.5, "b": 0.6}, {"a": -0.5, "b": 1.5}, {"a": float("nan"), "b": 1.0}):
        with pytest.raises(ValidationError):
            StaticMixing(weights=bad)
    with pytest.raises(UserError, match=r"mixing.weights.prse: the corpus has no such domain; did you mean \"prose\"\?"):
        resolve_weights({"prse": 1.0}, ["prose", "code"], [1, 1], "mixing.weights")
    with pytest.raises(UserError, match="no share for code"):
        resolve_weights({"prose": 1.0}, ["prose", "code"], [1, 1], "mixing.weights")
    assert resolve_weights("natural", ["a", "b"], [1, 3], "").tolist() == [0.25, 0.75]
