"""Every plan is one process, split: losses, and every parameter's gradient."""

from collections.abc import Callable

import pytest

from regrowth.parallel.ranks import RankPool
from regrowth.pretrain.conformance import Outcome, deviation, train
from regrowth.pretrain.conformance_plans import CASES, COVERING, Case

Ranks = Callable[[int], RankPool]


_references: dict[tuple[str, str, str], Outcome] = {}


def alone(case: Case) -> Outcome:
    if case.trained not in _references:
        _references[case.trained] = train(case.reference())
    return _references[case.trained]


def params() -> list:  # type: ignore[type-arg]
    return [pytest.param(case, id=case.name, marks=[] if case.name in COVERING else [pytest.mark.slow]) for case in CASES]


@pytest.mark.parametrize("case", params())
def test_a_plan_gives_the_losses_and_gradients_of_one_process(case: Case, ranks: Ranks) -> None:
    outcome = ranks(case.plan.world_size).run(train, case.setting())[0]
    reference = alone(case)
    assert reference.losses[-1] < reference.losses[0] - 0.1, "it learns, so the comparison says something"
    found = deviation(outcome, reference)
    assert {key: found[key] for key, limit in case.tolerances.items() if not found[key] <= limit} == {}
    if case.recipe == "full" and case.dtype == "float32":
        assert outcome.loads == reference.loads, "tokens went to the same experts"


def test_the_table_covers_what_it_promises() -> None:
    split = [frozenset(axis for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp") if getattr(case.plan, axis) > 1) for case in CASES]
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp")
    assert len(CASES) >= 40 and all(frozenset({axis}) in split for axis in axes)
    assert all(frozenset({a, b}) in split for a in axes for b in axes if a < b)
    assert sum(len(s) >= 3 for s in split) >= 5
    assert {case.plan.world_size for case in CASES} == {1, 2, 4, 8}
