"""Policies beyond ODM are held to slow implementations of their published formulas; bounds and the watch for saturation to what they promise."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from pydantic import TypeAdapter, ValidationError

from regrowth.data_pipeline.mixing.ado import AdaptiveDataOptimization, Curve
from regrowth.data_pipeline.mixing.bandits import DoReMi, Exp3, OnlineDataMixing
from regrowth.data_pipeline.mixing.build import build_policy
from regrowth.data_pipeline.mixing.config import AdoMixing, Mixing, Saturation, StaticMixing
from regrowth.data_pipeline.mixing.limits import Limits, SaturationMonitor, bounded
from regrowth.data_pipeline.mixing.mixer import Mixer
from regrowth.data_pipeline.mixing.policy import Static, unimax
from regrowth.data_pipeline.mixing.rewards import Reward, reference_losses
from regrowth.data_pipeline.mixing.scaling_law import ScalingLaw, fit
from regrowth.errors import UserError

DOMAINS = ["a", "b", "c"]


def mixing(**values: object) -> Mixing:
    """A mixing config."""
    return TypeAdapter(Mixing).validate_python(values)


def test_temperature_and_schedule() -> None:
    policy = build_policy(mixing(policy="static", temperature=2.0), DOMAINS, [100, 400, 1600])
    assert_allclose(policy.probabilities(0), np.array([10, 20, 40]) / 70)
    stages = [{"at_step": 0, "weights": {"a": 1, "b": 0, "c": 0}}, {"at_step": 10, "weights": {"a": 0, "b": 0.5, "c": 0.5}}]
    held, moving = (build_policy(mixing(policy="schedule", stages=stages, interpolate=i), DOMAINS, [1, 1, 1]) for i in (False, True))
    assert held.probabilities(9).tolist() == [1, 0, 0] and held.probabilities(10).tolist() == [0, 0.5, 0.5]
    assert_allclose(moving.probabilities(4), [0.6, 0.2, 0.2])
    assert moving.probabilities(10).tolist() == moving.probabilities(99).tolist() == [0, 0.5, 0.5]
    with pytest.raises(ValidationError, match="first stage begins at step 0"):
        mixing(policy="schedule", stages=[{"at_step": 3, "weights": "natural"}])


def test_unimax_is_as_uniform_as_the_epochs_allow() -> None:
    tokens = np.array([10.0, 1000.0, 50.0, 400.0])
    # By hand: 10 x 2 = 20 < 500; then (2000 - 20) / 3 = 660 > 100: 100; then 940 > 800: 800; the rest, 1080.
    assert_allclose(unimax(tokens, 2000, 2.0), np.array([20, 1080, 100, 800]) / 2000)
    assert_allclose(unimax(tokens, 30, 2.0), [0.25] * 4)
    assert_allclose(unimax(tokens, 1e9, 2.0), tokens / tokens.sum())  # every domain at its limit
    policy = build_policy(mixing(policy="unimax", epochs=2.0), list("abcd"), [10, 1000, 50, 400], budget_tokens=2000)
    assert_allclose(policy.probabilities(0), np.array([20, 1080, 100, 800]) / 2000)
    with pytest.raises(UserError, match="budget_tokens"):
        build_policy(mixing(policy="unimax"), DOMAINS, [1, 1, 1])


def observed(seed: int, steps: int, k: int = 3) -> list[dict[int, float]]:
    """Losses of the domains that were drawn, step by step."""
    rng = np.random.default_rng(seed)
    return [{int(d): float(rng.uniform(1, 4)) for d in np.unique(rng.integers(0, k, 2))} for _ in range(steps)]


def test_exp3_is_the_textbook_s() -> None:
    """Auer et al. 2002, figure 1, with weights kept as they are written there."""
    gamma, k = 0.2, 3
    policy = Exp3(np.full(k, 1 / k), gamma, (0.0, 5.0), warmup_steps=0)
    policy.update({0: 2.0}, np.full(k, 1 / k))
    weights = [math.exp(gamma * (2.0 / 5.0) / (1 / k) / k), 1.0, 1.0]
    for losses in observed(1, 60):
        shares = [(1 - gamma) * w / sum(weights) + gamma / k for w in weights]
        assert_allclose(policy.probabilities(0), shares, rtol=1e-10)
        policy.update(losses, np.array(shares))
        for arm, loss in losses.items():
            weights[arm] *= math.exp(gamma * (loss / 5.0) / shares[arm] / k)


def test_doremi_is_exponentiated_gradient_on_the_excess() -> None:
    """Xie et al. 2023, algorithm 1, lines 8 and 9."""
    eta, c, k, reference = 1.0, 1e-3, 3, [2.0, 2.5, 1.5]
    policy = DoReMi(np.full(k, 1 / k), eta, c, warmup_steps=0, reward=Reward("excess", reference, k))
    shares = [1 / k] * k
    for losses in observed(2, 60):
        policy.update(losses, policy.probabilities(0))
        raised = [w * math.exp(eta * max(losses[d] - reference[d], 0.0)) if d in losses else w for d, w in enumerate(shares)]
        shares = [(1 - c) * w / sum(raised) + c / k for w in raised]
        assert_allclose(policy.probabilities(0), shares, rtol=1e-9)
    assert_allclose(policy.probabilities(0).sum(), 1.0)


def test_rewards_by_decrease_and_excess() -> None:
    decrease = Reward("decrease", None, 2)
    assert decrease.of({0: 4.0}) == {}, "a first loss has nothing to have fallen from"
    assert decrease.of({0: 3.0, 1: 2.0}) == {0: 1.0}
    assert decrease.of({0: 3.0})[0] == pytest.approx(0.9 * 4 + 0.1 * 3 - 3)
    assert Reward("excess", [3.0, 1.0], 2).of({0: 2.5, 1: 2.0}) == {0: 0.0, 1: 1.0}
    # A domain that is only noise is paid most by its loss, and nothing by how far the loss falls.
    rng = np.random.default_rng(0)
    by = {kind: OnlineDataMixing(np.full(2, 0.5), "paper", 0.9, 0, "zero", Reward(kind, None, 2)) for kind in ("loss", "decrease")}
    for step in range(300):
        losses = {0: 5.0 + float(rng.normal(0, 0.05)), 1: 2.0 + 2.0 * math.exp(-step / 100)}
        for policy in by.values():
            policy.update(losses, policy.probabilities(0))
    assert by["loss"].probabilities(0)[0] > 0.5 and by["decrease"].probabilities(0)[1] > 0.5


def test_a_reference_is_a_table_or_a_run(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert reference_losses({"b": 2.0, "a": 1.0}, ["a", "b"]) == [1.0, 2.0]
    rows = [{"step": s, "domains": {"a": {"loss": 4.0 - s}, "b": {"loss": 1.0}}} for s in range(3)]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reference_losses(tmp_path, ["a", "b"]) == [2.0, 1.0]
    with pytest.raises(UserError, match="no loss for c"):
        reference_losses(tmp_path, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"no evaluations\.jsonl"):
        reference_losses(tmp_path / "none", ["a"])
    with pytest.raises(ValidationError, match="needs a reference"):
        mixing(policy="odm", reward="excess")


@pytest.mark.parametrize(("eps", "beta", "alpha"), [(1.8, 6.0, 0.3), (0.5, 3.0, 0.12), (2.5, 20.0, 0.6)])
def test_a_scaling_law_is_found_again(eps: float, beta: float, alpha: float) -> None:
    n = np.geomspace(20, 20_000, 120)
    clean = eps + beta * n**-alpha
    law = fit(n, clean)
    assert law.alpha == pytest.approx(alpha, rel=0.02) and math.exp(law.e) == pytest.approx(eps, rel=0.03)
    noisy = fit(n, clean * np.exp(np.random.default_rng(0).normal(0, 0.01, len(n))))
    assert noisy.loss(40_000) == pytest.approx(eps + beta * 40_000**-alpha, rel=0.01)
    slope = -(law.loss(1001) - law.loss(999)) / 2
    assert law.alpha * law.reducible(1000) / 1000 == pytest.approx(slope, rel=1e-4), "the derivative that ADO ranks domains by"


def slow_ado(config: AdoMixing, mu: list[float], steps: list[tuple[dict[int, float], np.ndarray]]) -> list[list[float]]:
    """ADO's shares after each update, by plain loops; laws are fitted by the same function."""
    k = len(mu)
    curves: list[Curve] = [Curve() for _ in range(k)]
    laws: list[ScalingLaw | None] = [None] * k
    read, credit, history, shares, out = [0.0] * k, list(mu), [list(mu)], list(mu), []
    for t, (losses, counts) in enumerate(steps, start=1):
        read = [r + c for r, c in zip(read, counts, strict=True)]
        if t > config.ignore_steps:
            for d, loss in losses.items():
                curves[d].add(read[d], loss)
        if t >= config.warmup_steps and (t - config.warmup_steps) % config.refit_every == 0:
            laws = [curve.fit() for curve in curves]
        if t >= config.warmup_steps and all(laws):
            known = [law for law in laws if law]
            speeds = [
                max(law.alpha, config.least_exponent) * (law.loss(n) - math.exp(law.e)) / n for law, n in zip(known, read, strict=True)
            ]
            rho = [m * h**config.credit_power * s for m, h, s in zip(mu, credit, speeds, strict=True)]
            rho = [r / sum(rho) for r in rho]
            mean = [sum(column) / len(history) for column in zip(*history, strict=True)]
            pi = [max(config.novelty * r + (1 - config.novelty) * m, config.least_share) for r, m in zip(rho, mean, strict=True)]
            shares = [p / sum(pi) for p in pi]
            history.append(shares)
            credit = [config.history_rate * p + (1 - config.history_rate) * h for p, h in zip(shares, credit, strict=True)]
        out.append(shares)
    return out


def test_ado_is_its_formulas_and_resumes_exactly() -> None:
    config = AdoMixing(policy="ado", warmup_steps=40, refit_every=25, ignore_steps=5)
    mu, rng = [0.5, 0.3, 0.2], np.random.default_rng(4)
    exponents = [0.1, 0.5, 0.3]
    read, steps = np.zeros(3), []
    for _ in range(160):
        counts = rng.multinomial(8, mu)
        read = read + counts
        steps.append(({d: 1.5 + 3 * read[d] ** -exponents[d] for d in range(3) if counts[d]}, counts))
    whole, stopped = (AdaptiveDataOptimization(np.array(mu), config) for _ in range(2))
    for number, ((losses, counts), expected) in enumerate(zip(steps, slow_ado(config, mu, steps), strict=True)):
        whole.update(losses, whole.probabilities(0), counts)
        stopped.update(losses, stopped.probabilities(0), counts)
        assert_allclose(whole.probabilities(0), expected, rtol=1e-9)
        if number in (30, 70):
            state = json.loads(json.dumps(stopped.state_dict()))
            stopped = AdaptiveDataOptimization(np.array(mu), config)
            stopped.load_state_dict(state)
        assert stopped.probabilities(0).tolist() == whole.probabilities(0).tolist()
    assert whole.laws[0] is not None and whole.laws[0].alpha == pytest.approx(0.1, abs=0.03)


def test_a_curve_holds_a_bounded_number_of_points() -> None:
    curve = Curve()
    for n in range(1, 5000):
        curve.add(float(n), 3.0 + 100.0 / n)
    assert len(curve.points) <= 256 and sum(point[2] for point in curve.points) == 4999
    assert isinstance(curve.fit(), ScalingLaw)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=8), st.data())
def test_bounded_shares_keep_their_bounds_and_their_proportions(raw: list[float], data: st.DataObject) -> None:
    shares = np.array(raw) / sum(raw)
    k = len(raw)
    low = np.array(data.draw(st.lists(st.floats(0, 1 / k), min_size=k, max_size=k)))
    high = np.maximum(np.array(data.draw(st.lists(st.floats(1 / k, 1), min_size=k, max_size=k))), low)
    result = bounded(shares, low, high)
    assert result.sum() == pytest.approx(1.0) and (result >= low - 1e-9).all() and (result <= high + 1e-9).all()
    free = (result > low + 1e-6) & (result < high - 1e-6)
    if free.sum() > 1:
        ratios = result[free] / shares[free]
        assert ratios.max() / ratios.min() < 1 + 1e-6


def test_bounds_that_cannot_be_met_are_refused_and_unknown_domains_named() -> None:
    for values, told in (
        ({"min_share": 0.4}, "sum to 1.2"),
        ({"max_share": 0.3}, "sum to 0.9"),
        ({"min_share": {"a": 0.5}, "max_share": {"a": 0.4}}, "above mixing.max_share for a"),
        ({"max_epochs": {"aa": 2.0}}, "mixing.max_epochs.aa: the corpus has no such domain"),
    ):
        with pytest.raises(UserError, match=told):
            Limits.of(StaticMixing.model_validate(values), DOMAINS)
    limits = Limits.of(StaticMixing(min_share=0.1, max_share={"a": 0.5}), DOMAINS)
    assert_allclose(limits.apply(np.array([0.9, 0.08, 0.02]), np.ones(3, bool)), [0.5, 0.4, 0.1])
    assert limits.apply(np.array([0.5, 0.5, 0.0]), np.ones(3, bool))[2] == 0, "what a policy leaves out stays out"
    assert limits.apply(np.array([0.5, 0.3, 0.2]), np.array([True, False, False])).tolist() == [1, 0, 0], "one is left: its bound gives way"


def test_draws_end_where_the_epochs_do() -> None:
    mixer = Mixer(Static(np.array([0.8, 0.1, 0.1])), DOMAINS, 10, 1, 0, Limits.of(StaticMixing(max_epochs=1), DOMAINS))
    left = np.array([7.0, 30.0, 4.0])
    for step in range(4):
        drawn = mixer.draw(step, left)
        left = left - np.bincount(drawn, minlength=3)
        assert (left >= 0).all()
    assert left.sum() == 1
    with pytest.raises(UserError, match=r"step 9: every domain that the policy draws has been read as often as mixing.max_epochs allows"):
        mixer.draw(9, left)
    watch = SaturationMonitor(Saturation(window=8, share_factor=0.1), 3)
    watch.saturated = [True, False, False]
    both = Mixer(Static(np.array([0.5, 0.3, 0.2])), DOMAINS, 4000, 1, 0, Limits.of(StaticMixing(max_epochs=1), DOMAINS), watch)
    drawn = both.draw(0, np.array([1e6, 1e6, 0.0]))
    share = both.pending[-1]["probabilities"][0]
    assert share == pytest.approx(0.05 / 0.35) and abs((drawn == 0).mean() - share) < 0.03, "what is logged is what is drawn by"
    unwanted = Mixer(Static(np.array([1.0, 0.0, 0.0])), DOMAINS, 10, 1, 0, Limits.of(StaticMixing(max_epochs=1), DOMAINS))
    with pytest.raises(UserError, match=r"step 0: every domain that the policy draws has"):
        unwanted.draw(0, np.array([9.0, 50.0, 50.0]))


def test_the_watch_tells_a_flat_domain_from_a_falling_and_from_a_noisy_one() -> None:
    monitor = SaturationMonitor(Saturation(window=40, least_gain=0.01, share_factor=0.5), 3)
    rng = np.random.default_rng(0)
    changes = []
    for step in range(400):
        flat = 2.0 if step < 200 else 2.0 - 0.01 * (step - 200)
        losses = {0: flat + float(rng.normal(0, 0.01)), 1: 4.0 - 0.005 * step, 2: 3.0 + float(rng.normal(0, 1.0))}
        changes += [(step, d, monitor.saturated[d]) for d in monitor.observe(losses)]
    assert [(d, s) for _, d, s in changes if d == 0] == [(0, True), (0, False)] and not any(d == 1 for _, d, _ in changes)
    assert not any(d == 2 for _, d, _ in changes), "noise that hides a fall is no verdict"
    again = SaturationMonitor(monitor.config, 3)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.state_dict() == monitor.state_dict()
    monitor.saturated = [True, False, False]
    mixer = Mixer(Static(np.array([0.5, 0.25, 0.25])), DOMAINS, 4, 1, 0, Limits.of(StaticMixing(), DOMAINS), monitor)
    mixer.draw(0)
    assert_allclose(mixer.pending[-1]["probabilities"], [1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("kind", ["odm", "exp3", "doremi", "ado"])
def test_a_domain_joins_and_another_leaves(kind: str) -> None:
    more = {"doremi": {"reward": "loss"}}.get(kind, {})
    config = mixing(policy=kind, initial="uniform", warmup_steps=3, **more)

    def mixer(domains: list[str]) -> Mixer:
        return Mixer(build_policy(config, domains, [1] * len(domains)), domains, 6, 2, 0)

    first = mixer(["b", "c"])
    for step in range(30):
        drawn = first.draw(step)
        first.observe(step, {int(d): 2.0 + int(d) for d in set(drawn.tolist())})
    second = mixer(["a", "b", "d"])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    theirs, mine = first.policy.state_dict(), second.policy.state_dict()
    for key, default in second.policy.per_domain.items():
        if isinstance(theirs[key][0], float):
            assert mine[key][1] == pytest.approx(theirs[key][0], abs=1e-9) or key == "shares", "b keeps what was learnt of it"
            if default == "mean" and key != "shares":
                assert mine[key][0] == pytest.approx(np.mean(theirs[key]))
    for step in range(30, 60):
        drawn = second.draw(step)
        assert second.pending[-1]["probabilities"] == pytest.approx(np.array(second.pending[-1]["probabilities"]) / 1.0)
        second.observe(step, {int(d): 2.0 for d in set(drawn.tolist())})
    assert_allclose(sum(second.pending[-1]["probabilities"]), 1.0)


@pytest.mark.parametrize("kind", ["static", "odm", "exp3", "doremi", "ado"])
def test_one_domain_and_broken_losses(kind: str) -> None:
    more: dict[str, object] = {} if kind == "static" else {"warmup_steps": 2}
    more |= {"reward": "loss"} if kind == "doremi" else {}
    alone = Mixer(build_policy(mixing(policy=kind, **more), ["a"], [10]), ["a"], 4, 1, 0)
    pair = Mixer(build_policy(mixing(policy=kind, **more), ["a", "b"], [10, 10]), ["a", "b"], 4, 1, 0)
    for step in range(12):
        assert alone.draw(step).tolist() == [0] * 4
        row = alone.observe(step, {0: math.nan if step % 2 else 3.0})
        assert row["probabilities"] == [1.0]
        pair.draw(step)
        pair.observe(step, {0: math.nan, 1: 3.0})
    assert all(math.isfinite(p) for p in pair.pending[-1]["probabilities"])
