"""Mixing policies: which share of a step each domain gets. One interface; a policy is a part of the training state.

A policy is a deterministic function of the losses it was shown. It is updated once a step, with the mean loss of each domain that the
losses cover and the probabilities those draws were made with.
"""

import math
from typing import Any, Protocol

import numpy as np

from regrowth.data_pipeline.config import Mixing, OdmMixing, StaticMixing
from regrowth.errors import UserError, nearest


class Policy(Protocol):
    """What the mixer needs of a policy."""

    def probabilities(self) -> np.ndarray: ...

    def update(self, losses: dict[int, float], drawn_with: np.ndarray) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Static:
    """Fixed shares."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights

    def probabilities(self) -> np.ndarray:
        """float64 [K]."""
        return self.weights

    def update(self, losses: dict[int, float], drawn_with: np.ndarray) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class OnlineDataMixing:
    """ODM (Albalak et al. 2023, arXiv 2312.02406, algorithm 1): K domains are the arms, a domain's training loss is its reward.

    paper form      R_i <- alpha R_i + (1 - alpha) L_i / pi_i;      pi = (1 - K eps_t) softmax(eps_{t-1} R) + eps_t
    released form   R_i <- alpha R_i + (1 - alpha) exp(L_i);        pi = (1 - K eps_t) R / sum R + eps_t
    with eps_t = min(1/K, sqrt(ln K / (K t))); only domains that were drawn are updated. The mixture stays at `initial` for `warmup_steps`
    updates, during which rewards are gathered if they start at the first loss, and left at zero if they start at zero.
    """

    def __init__(self, initial: np.ndarray, form: str, alpha: float, warmup_steps: int, initial_reward: str) -> None:
        self.initial, self.form, self.alpha = np.asarray(initial, dtype=np.float64), form, alpha
        self.warmup_steps, self.initial_reward = warmup_steps, initial_reward
        self.rewards = np.zeros(len(initial))
        self.seen = np.zeros(len(initial), dtype=bool)
        self.step = 0  # updates so far; the paper's t

    def epsilon(self, t: int) -> float:
        """The exploration floor at step t."""
        k = len(self.initial)
        return 1.0 / k if t <= 0 else min(1.0 / k, math.sqrt(math.log(k) / (k * t)))

    def probabilities(self) -> np.ndarray:
        """float64 [K], summing to 1."""
        k, eps = len(self.initial), self.epsilon(self.step)
        if k == 1:
            return np.ones(1)
        if self.step <= self.warmup_steps:
            return self.initial
        if self.form == "paper":
            scores = self.epsilon(self.step - 1) * self.rewards
            weights = np.exp(scores - scores.max())
        else:
            weights = self.rewards if self.rewards.sum() > 0 else np.ones(k)
        return (1.0 - k * eps) * weights / weights.sum() + eps

    def update(self, losses: dict[int, float], drawn_with: np.ndarray) -> None:
        """One step's mean losses by domain; a loss that is not finite is passed over."""
        self.step += 1
        if self.step <= self.warmup_steps and self.initial_reward == "zero":
            return
        for domain, loss in losses.items():
            if not math.isfinite(loss):
                continue
            reward = loss / drawn_with[domain] if self.form == "paper" else math.exp(min(loss, 50.0))
            if self.initial_reward == "first_loss" and not self.seen[domain]:
                self.rewards[domain], self.seen[domain] = reward, True
            else:
                self.rewards[domain] = self.alpha * self.rewards[domain] + (1.0 - self.alpha) * reward

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floats survive exactly."""
        return {"rewards": self.rewards.tolist(), "seen": self.seen.tolist(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rewards, self.seen, self.step = np.array(state["rewards"]), np.array(state["seen"]), int(state["step"])


def build_policy(config: Mixing, domains: list[str], tokens: list[int]) -> Policy:
    """The policy of a config over these domains (with their training tokens, for natural shares).

    Raises:
        UserError: weights name a domain that the corpus does not have, or leave one out.
    """
    if isinstance(config, StaticMixing):
        return Static(resolve_weights(config.weights, domains, tokens, "mixing.weights"))
    assert isinstance(config, OdmMixing)
    initial = resolve_weights(config.initial, domains, tokens, "mixing.initial")
    return OnlineDataMixing(initial, config.form, config.alpha, config.warmup_steps, config.initial_reward)


def resolve_weights(weights: dict[str, float] | str, domains: list[str], tokens: list[int], key: str) -> np.ndarray:
    """Shares as float64 [K] in the order of `domains`, summing to 1."""
    if weights == "natural":
        shares = np.array(tokens, dtype=np.float64)
    elif weights == "uniform":
        shares = np.ones(len(domains))
    else:
        assert isinstance(weights, dict)
        for name in weights:
            if name not in domains:
                raise UserError(f"{key}.{name}: the corpus has no such domain; {nearest(name, domains)}")
        if missing := [d for d in domains if d not in weights]:
            raise UserError(f"{key}: no share for {', '.join(missing)}. Give each domain one; 0 leaves a domain out.")
        shares = np.array([weights[d] for d in domains])
    return shares / shares.sum()
