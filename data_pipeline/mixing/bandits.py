"""Policies that learn from losses as bandits do: ODM in both its forms, EXP3, and DoReMi's exponentiated gradient.

All begin with `warmup_steps` updates at the initial mixture; a loss that is not finite is passed over.
"""

import math
from typing import Any

import numpy as np

from regrowth.data_pipeline.mixing.rewards import Reward

# The exponent at which a released-form reward is cut off, so that a broken loss cannot make an infinite one.
_LARGEST_EXPONENT = 50.0


class Bandit:
    """What the learning policies share: the initial mixture, the warm-up, the rewards' source."""

    learns = True
    per_domain: dict[str, Any] = {"rewards": "mean", "means": None}

    def __init__(self, initial: np.ndarray, warmup_steps: int, reward: Reward | None = None) -> None:
        self.initial, self.warmup_steps = np.asarray(initial, dtype=np.float64), warmup_steps
        self.reward = reward or Reward("loss", None, len(initial))
        self.rewards = [0.0] * len(initial)
        self.step = 0  # updates so far

    def probabilities(self, step: int) -> np.ndarray:
        """float64 [K], summing to 1."""
        if len(self.initial) == 1:
            return np.ones(1)
        return self.initial if self.step <= self.warmup_steps else np.array(self._learnt())

    def update(self, losses: dict[int, float], drawn_with: np.ndarray, counts: np.ndarray | None = None) -> None:
        """One step's mean losses by domain, with the probabilities that it was drawn with; `counts` (units drawn) do not matter here."""
        self.step += 1
        paid = self.reward.of({domain: loss for domain, loss in losses.items() if math.isfinite(loss)})
        self._learn(paid, drawn_with)

    def rewards_now(self) -> list[float] | None:
        """float [K]: what the next mixture is made of."""
        return list(self.rewards)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floats survive exactly."""
        return {"rewards": list(self.rewards), "means": list(self.reward.means), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rewards, self.step, self.reward.means = list(state["rewards"]), int(state["step"]), list(state["means"])

    def _learnt(self) -> list[float]:
        raise NotImplementedError

    def _learn(self, paid: dict[int, float], drawn_with: np.ndarray) -> None:
        raise NotImplementedError


class OnlineDataMixing(Bandit):
    """ODM (Albalak et al. 2023, arXiv 2312.02406, algorithm 1): K domains are the arms, a domain's training loss is its reward.

    paper form      R_i <- alpha R_i + (1 - alpha) L_i / pi_i;      pi = (1 - K eps_t) softmax(eps_{t-1} R) + eps_t
    released form   R_i <- alpha R_i + (1 - alpha) exp(L_i);        pi = (1 - K eps_t) R / sum R + eps_t
    with eps_t = min(1/K, sqrt(ln K / (K t))); only domains that were drawn are updated. During the warm-up rewards are gathered if they start
    at the first loss, and left at zero if they start at zero.
    """

    per_domain = {**Bandit.per_domain, "seen": False}

    def __init__(self, initial: np.ndarray, form: str, alpha: float, warmup_steps: int, initial_reward: str, reward: Reward | None = None) -> None:  # fmt: skip
        super().__init__(initial, warmup_steps, reward)
        self.form, self.alpha, self.initial_reward = form, alpha, initial_reward
        self.seen = np.zeros(len(initial), dtype=bool)

    def epsilon(self, t: int) -> float:
        """The exploration floor at step t."""
        k = len(self.initial)
        return 1.0 / k if t <= 0 else min(1.0 / k, math.sqrt(math.log(k) / (k * t)))

    def _learnt(self) -> list[float]:
        k, eps = len(self.initial), self.epsilon(self.step)
        if self.form == "paper":
            weights = _softmax(self.rewards, self.epsilon(self.step - 1))
        else:
            total = math.fsum(self.rewards)
            weights = [reward / total for reward in self.rewards] if total > 0 else [1.0 / k] * k
        return [(1.0 - k * eps) * weight + eps for weight in weights]

    def _learn(self, paid: dict[int, float], drawn_with: np.ndarray) -> None:
        if self.step <= self.warmup_steps and self.initial_reward == "zero":
            return
        rewards, shares = self.rewards, drawn_with.tolist()
        for domain, loss in paid.items():
            reward = loss / shares[domain] if self.form == "paper" else math.exp(min(loss, _LARGEST_EXPONENT))
            if self.initial_reward == "first_loss" and not self.seen[domain]:
                rewards[domain], self.seen[domain] = reward, True
            else:
                rewards[domain] = self.alpha * rewards[domain] + (1.0 - self.alpha) * reward

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floats survive exactly."""
        return {**super().state_dict(), "seen": self.seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state)
        self.seen = np.array(state["seen"])


class Exp3(Bandit):
    """EXP3 (Auer et al. 2002, figure 1): w_i <- w_i exp(gamma x_i / (p_i K)); p = (1 - gamma) w / sum w + gamma / K.

    `rewards` are the logarithms of the weights. A reward x is scaled from `reward_range` to 0..1 and clipped.
    """

    def __init__(self, initial: np.ndarray, gamma: float, reward_range: tuple[float, float], warmup_steps: int, reward: Reward | None = None) -> None:  # fmt: skip
        super().__init__(initial, warmup_steps, reward)
        self.gamma, (self.low, self.high) = gamma, reward_range

    def _learnt(self) -> list[float]:
        return [(1.0 - self.gamma) * weight + self.gamma / len(self.rewards) for weight in _softmax(self.rewards)]

    def _learn(self, paid: dict[int, float], drawn_with: np.ndarray) -> None:
        if self.step <= self.warmup_steps:
            return
        for domain, value in paid.items():
            scaled = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
            self.rewards[domain] += self.gamma * scaled / (float(drawn_with[domain]) * len(self.initial))


class DoReMi(Bandit):
    """w_i <- w_i exp(eta x_i), normalised; p = (1 - c) w + c / K (Xie et al. 2023, algorithm 1), on domain means of the rewards.

    `rewards` are the logarithms of w. The paper takes per-token excess over a reference model, clipped at zero, and averages the weights of a
    proxy's run; here the excess is of domain means, and the run itself follows the weights.
    """

    def __init__(self, initial: np.ndarray, step_size: float, smoothing: float, warmup_steps: int, reward: Reward | None = None) -> None:
        super().__init__(initial, warmup_steps, reward)
        self.step_size, self.smoothing = step_size, smoothing
        self.rewards = [math.log(max(float(share), 1e-12)) for share in self.initial]

    def _learnt(self) -> list[float]:
        return _softmax(self.rewards)

    def _learn(self, paid: dict[int, float], drawn_with: np.ndarray) -> None:
        if self.step <= self.warmup_steps:
            return
        for domain, value in paid.items():
            self.rewards[domain] += self.step_size * value
        even = self.smoothing / len(self.rewards)
        self.rewards = [math.log((1.0 - self.smoothing) * weight + even) for weight in self._learnt()]


def _softmax(scores: list[float], factor: float = 1.0) -> list[float]:
    """exp(factor * score), normalised. In plain floats: at this size twice as fast as arrays, and NumPy's exp differs in the last bit between CPUs, which
    a log that is recomputed elsewhere would show."""
    highest = max(scores)
    weights = [math.exp(factor * (score - highest)) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
