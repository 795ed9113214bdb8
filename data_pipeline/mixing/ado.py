"""Adaptive data optimization (Jiang et al. 2024, arXiv 2410.11820): domains are chosen by how fast their scaling law says they are being learnt.

With n_k units read of domain k and its law L_k(n) = eps_k + beta_k n^-alpha_k, refitted every so often,

    rho_k ~ mu_k h_k^s max(alpha_k, least) (L_k(n_k) - eps_k) / n_k        preference: prior, credit, learning speed
    pi    = g rho + (1 - g) mean of pi so far,  no share below `least_share`
    h     <- r pi + (1 - r) h                                              credit: what the domain's recent share was
"""

import math
from typing import Any

import numpy as np

from regrowth.data_pipeline.mixing.config import AdoMixing
from regrowth.data_pipeline.mixing.scaling_law import ScalingLaw, fit

# Points that a law is fitted to, per domain: when there are twice as many, neighbours are averaged.
_POINTS = 128


class AdaptiveDataOptimization:
    """The policy. `mu` is the initial mixture [K]."""

    learns = True
    per_domain: dict[str, Any] = {"read": 0.0, "curves": None, "laws": None, "credit": "mean", "mean_share": "mean", "shares": "mean"}

    def __init__(self, initial: np.ndarray, config: AdoMixing) -> None:
        k = len(initial)
        self.initial, self.config = np.asarray(initial, dtype=np.float64), config
        self.read = np.zeros(k)  # units
        self.curves: list[Curve] = [Curve() for _ in range(k)]
        self.laws: list[ScalingLaw | None] = [None] * k
        self.credit, self.mean_share, self.shares = self.initial.copy(), self.initial.copy(), self.initial.copy()
        self.step = 0  # updates so far
        self.averaged = 1  # shares in `mean_share`

    def probabilities(self, step: int) -> np.ndarray:
        """float64 [K], summing to 1."""
        return self.shares

    def update(self, losses: dict[int, float], drawn_with: np.ndarray, counts: np.ndarray | None = None) -> None:
        """One step's mean losses by domain and the units drawn of each."""
        assert counts is not None
        config, self.step = self.config, self.step + 1
        self.read += counts
        if self.step > config.ignore_steps:
            for domain, loss in losses.items():
                if math.isfinite(loss) and loss > 0:
                    self.curves[domain].add(float(self.read[domain]), loss)
        since = self.step - config.warmup_steps
        if since >= 0 and since % config.refit_every == 0:
            self.laws = [curve.fit() or law for curve, law in zip(self.curves, self.laws, strict=True)]
        if since >= 0 and len(self.shares) > 1 and any(self.laws):
            self._move()

    def _move(self) -> None:
        config, open_ = self.config, self.initial > 0
        speed = np.zeros(len(self.initial))
        known = [(i, law) for i, law in enumerate(self.laws) if law and open_[i]]
        for i, law in known:
            n = max(self.read[i], 1.0)
            speed[i] = max(law.alpha, config.least_exponent) * law.reducible(n) / n
        if not known or speed.sum() <= 0:
            return
        waiting = open_ & np.array([law is None for law in self.laws])
        speed[waiting] = np.mean([speed[i] for i, _ in known])  # a domain too little of which was seen learns like the others
        preference = self.initial * self.credit**config.credit_power * speed
        preference /= preference.sum()
        mixed = config.novelty * preference + (1.0 - config.novelty) * self.mean_share
        floor = min(config.least_share, 1.0 / max(int(open_.sum()), 1))
        shares = np.where(open_, np.maximum(mixed, floor), 0.0)
        self.shares = shares / shares.sum()
        self.credit = config.history_rate * self.shares + (1.0 - config.history_rate) * self.credit
        self.averaged += 1
        self.mean_share = self.mean_share + (self.shares - self.mean_share) / self.averaged

    def rewards_now(self) -> list[float] | None:
        """float [K]: each law's exponent, 0 before there is one."""
        return [law.alpha if law else 0.0 for law in self.laws]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floats survive exactly."""
        return {
            "read": self.read.tolist(),
            "curves": [curve.state() for curve in self.curves],
            "laws": [[law.a, law.alpha, law.e] if law else None for law in self.laws],
            "credit": self.credit.tolist(),
            "mean_share": self.mean_share.tolist(),
            "shares": self.shares.tolist(),
            "step": self.step,
            "averaged": self.averaged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.read = np.array(state["read"])
        self.curves = [Curve.of(curve) for curve in state["curves"]]
        self.laws = [ScalingLaw(*law) if law else None for law in state["laws"]]
        self.credit, self.mean_share = np.array(state["credit"]), np.array(state["mean_share"])
        shares = np.array(state["shares"])
        self.shares = shares / shares.sum()
        self.step, self.averaged = int(state["step"]), int(state["averaged"])


class Curve:
    """A domain's losses over what was read of it, as at most 256 averages of as many neighbours each."""

    def __init__(self) -> None:
        self.width = 1
        self.points: list[list[float]] = []  # mean n, mean loss, losses in it

    def add(self, n: float, loss: float) -> None:
        """One more loss, after n units."""
        if self.points and self.points[-1][2] < self.width:
            mean_n, mean, count = self.points[-1]
            self.points[-1] = [mean_n + (n - mean_n) / (count + 1), mean + (loss - mean) / (count + 1), count + 1]
        else:
            self.points.append([n, loss, 1])
        if len(self.points) == 2 * _POINTS and self.points[-1][2] == self.width:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [[(a[0] + b[0]) / 2, (a[1] + b[1]) / 2, a[2] + b[2]] for a, b in pairs]
            self.width *= 2

    def fit(self) -> ScalingLaw | None:
        """The law, or None while there are fewer than eight points."""
        if len(self.points) < 8:
            return None
        points = np.array(self.points)
        return fit(points[:, 0], points[:, 1])

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"width": self.width, "points": self.points}

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> "Curve":
        """What `state` gave, or an empty one."""
        curve = cls()
        if state:
            curve.width, curve.points = int(state["width"]), [list(point) for point in state["points"]]
        return curve
