"""Mixing policies: which share of a step each domain gets. One interface; a policy is a part of the training state.

A policy is a deterministic function of the step and of the losses it was shown: the mean loss of each domain of a step, with the probabilities
those draws were made with. This file has the policies that do not learn; `bandits.py` and `ado.py` have the others.
"""

from typing import Any, Protocol

import numpy as np

from regrowth.data_pipeline.mixing.config import MixingStage, Shares
from regrowth.errors import UserError, nearest


class Policy(Protocol):
    """What the mixer needs of a policy.

    `per_domain` names the entries of its state that are lists over domains, and what a domain that joins later begins with: a value, or "mean",
    the mean of the others. `update` is told the mean loss of each domain of a step, the probabilities [K] that it was drawn with, and how many
    units [K] were drawn.
    """

    learns: bool
    per_domain: dict[str, Any]

    def probabilities(self, step: int) -> np.ndarray: ...

    def update(self, losses: dict[int, float], drawn_with: np.ndarray, counts: np.ndarray | None = None) -> None: ...

    def rewards_now(self) -> list[float] | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Planned:
    """Learns nothing, keeps nothing."""

    learns = False
    per_domain: dict[str, Any] = {}

    def update(self, losses: dict[int, float], drawn_with: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Learns nothing."""

    def rewards_now(self) -> list[float] | None:
        """There are none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Static(_Planned):
    """Fixed shares."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights

    def probabilities(self, step: int) -> np.ndarray:
        """float64 [K]."""
        return self.weights


class Schedule(_Planned):
    """Shares by stages: held, or moving in a straight line from one stage to the next."""

    def __init__(self, stages: list[tuple[int, np.ndarray]], interpolate: bool) -> None:
        self.stages, self.interpolate = stages, interpolate

    def probabilities(self, step: int) -> np.ndarray:
        """float64 [K]."""
        at = max(i for i, (begin, _) in enumerate(self.stages) if begin <= step)
        begin, shares = self.stages[at]
        if not self.interpolate or at + 1 == len(self.stages):
            return shares
        end, after = self.stages[at + 1]
        mixed = shares + (after - shares) * ((step - begin) / (end - begin))
        return mixed / mixed.sum()


def unimax(tokens: np.ndarray, budget: float, epochs: float) -> np.ndarray:
    """float64 [K]: the budget shared out evenly, from the smallest domain up, none getting more than its tokens times `epochs`.

    Algorithm 1 of Chung et al. 2023. What is left over when every domain is at its limit stays unspent: the shares are of what was given.
    """
    given, left = np.zeros(len(tokens)), float(budget)
    for place, domain in enumerate(np.argsort(tokens, kind="stable")):
        given[domain] = min(left / (len(tokens) - place), epochs * tokens[domain])
        left -= given[domain]
    return given / given.sum()


def schedule_of(stages: list[MixingStage], interpolate: bool, domains: list[str], tokens: list[int]) -> Schedule:
    """The stages of a config over these domains."""
    resolved = [
        (stage.at_step, resolve_weights(stage.weights, domains, tokens, f"mixing.stages.{i}.weights")) for i, stage in enumerate(stages)
    ]
    return Schedule(resolved, interpolate)


def resolve_weights(weights: Shares, domains: list[str], tokens: list[int], key: str, temperature: float = 1.0) -> np.ndarray:
    """Shares as float64 [K] in the order of `domains`, summing to 1.

    Raises:
        UserError: weights name a domain that the corpus does not have, or leave one out.
    """
    if weights == "natural":
        shares = np.array(tokens, dtype=np.float64)
    elif weights == "uniform":
        shares = np.ones(len(domains))
    else:
        assert isinstance(weights, dict)
        check_names(weights, domains, key)
        if missing := [d for d in domains if d not in weights]:
            raise UserError(f"{key}: no share for {', '.join(missing)}. Give each domain one; 0 leaves a domain out.")
        shares = np.array([weights[d] for d in domains])
    if temperature != 1.0:
        shares = (shares / shares.sum()) ** (1.0 / temperature)
    return shares / shares.sum()


def check_names(table: dict[str, Any], domains: list[str], key: str) -> None:
    """Every domain that a table names is one of the corpus.

    Raises:
        UserError: one is not; the nearest name is told.
    """
    for name in table:
        if name not in domains:
            raise UserError(f"{key}.{name}: the corpus has no such domain; {nearest(name, domains)}")
