"""A power law of a domain's loss over what was read of it: L(n) = eps + beta n^-alpha, fitted in log space.

    log L = logsumexp(a - alpha ln n, e)      a = ln beta, e = ln eps

with a Huber loss of 1e-3 on the logarithms, from a grid of starts (Hoffmann et al. 2022; as ADO fits it, Jiang et al. 2024).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from regrowth.errors import need

_HUBER = 1e-3
_STARTS = 4  # the best points of the grid, from which the search goes on


@dataclass(frozen=True)
class ScalingLaw:
    """The law of one domain."""

    a: float
    alpha: float
    e: float

    def reducible(self, n: float) -> float:
        """How far the loss at n is above the irreducible one, in nats."""
        return float(np.exp(self.a - self.alpha * np.log(n)))

    def loss(self, n: float) -> float:
        """The predicted loss at n."""
        return self.reducible(n) + float(np.exp(self.e))


def fit(n: np.ndarray, losses: np.ndarray) -> ScalingLaw:
    """The law through losses [points], positive, after n [points] units.

    Raises:
        UserError: SciPy is not installed.
    """
    optimize: Any = need("scipy.optimize", "fitting the scaling laws of ADO")
    ln_n, ln_loss = np.log(n), np.log(losses)
    lowest = float(losses.min())
    starts = []
    for alpha in (0.05, 0.1, 0.2, 0.4, 0.8):
        for part in (0.1, 0.4, 0.7, 0.95):
            above = np.maximum(losses - part * lowest, 1e-9)
            starts.append(np.array([np.mean(np.log(above) + alpha * ln_n), alpha, np.log(part * lowest)]))
    starts.sort(key=lambda x: _objective(x, ln_n, ln_loss)[0])
    bounds = [(-20.0, 40.0), (0.0, 1.0), (-20.0, float(np.log(lowest)))]
    found = [
        optimize.minimize(_objective, start, (ln_n, ln_loss), method="L-BFGS-B", jac=True, bounds=bounds) for start in starts[:_STARTS]
    ]
    best = min(found, key=lambda result: result.fun)
    return ScalingLaw(*(float(x) for x in best.x))


def _objective(x: np.ndarray, ln_n: np.ndarray, ln_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """The Huber loss and its gradient, in units of 1e-3 squared so that the search does not stop early."""
    power = x[0] - x[1] * ln_n
    predicted = np.logaddexp(power, x[2])
    off = (predicted - ln_loss) / _HUBER
    small = np.abs(off) <= 1.0
    value = np.where(small, 0.5 * off**2, np.abs(off) - 0.5)
    slope = np.clip(off, -1.0, 1.0) / _HUBER
    share = np.exp(power - predicted)  # of the power term in the predicted loss
    gradient = np.array([np.mean(slope * share), np.mean(-slope * share * ln_n), np.mean(slope * (1.0 - share))])
    return float(value.mean()), gradient
