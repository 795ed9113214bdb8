"""Bounds on a mixture whatever the policy says: least and largest shares, epochs, and domains whose loss no longer falls."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from regrowth.data_pipeline.mixing.config import MixingBase, Saturation
from regrowth.data_pipeline.mixing.policy import check_names
from regrowth.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds by domain, float64 [K] each; `epochs` is infinite where there is no limit."""

    low: np.ndarray
    high: np.ndarray
    epochs: np.ndarray

    @classmethod
    def of(cls, config: MixingBase, domains: list[str]) -> "Limits":
        """The bounds of a config.

        Raises:
            UserError: they name an unknown domain, or no mixture lies within them.
        """
        low, high = _by_domain(config, "min_share", 0.0, domains), _by_domain(config, "max_share", 1.0, domains)
        if crossed := [f"{d} ({a:g} to {b:g})" for d, a, b in zip(domains, low, high, strict=True) if a > b]:
            raise UserError(f"mixing.min_share is above mixing.max_share for {', '.join(crossed)}.")
        if low.sum() > 1.0 + 1e-9:
            raise UserError(
                f"mixing.min_share: the least shares of {len(domains)} domains sum to {low.sum():.4g}; lower them to at most 1 together."
            )
        if high.sum() < 1.0 - 1e-9:
            raise UserError(
                f"mixing.max_share: the largest shares of {len(domains)} domains sum to {high.sum():.4g}; raise them to at least 1."
            )
        return cls(low, high, _by_domain(config, "max_epochs", np.inf, domains))

    @property
    def bound_shares(self) -> bool:
        """Whether there are bounds on shares at all."""
        return bool((self.low > 0).any() or (self.high < 1).any())

    def apply(self, shares: np.ndarray, open_: np.ndarray) -> np.ndarray:
        """The shares [K] within the bounds, in proportion to what they were wherever no bound holds them; none where not `open_` [K].

        A domain that the policy leaves out (share 0) stays out; one at least has to be open and wanted. If the bounds of those that are left
        cannot be met, the upper ones give way.
        """
        wanted = np.where(open_, shares, 0.0)
        wanted = wanted / wanted.sum()
        if not self.bound_shares:
            return wanted
        low, high = np.where(wanted > 0, self.low, 0.0), np.where(wanted > 0, self.high, 0.0)
        if high.sum() < 1.0:
            high = high / high.sum()
        return bounded(wanted, low, high)


def units_left(most: np.ndarray, taken: list[int], unit_sequences: int) -> np.ndarray | None:
    """float64 [K]: units that may still be read of each domain; None where no domain has a limit.

    Args:
        most: float64 [K], sequences that may be read of each domain in all.
        taken: sequences that were.
    """
    return None if np.isinf(most).all() else np.floor((most - np.array(taken)) / unit_sequences)


def bounded(shares: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """clip(c * shares, low, high) [K] with the one c that makes it sum to 1; shares sum to 1, low <= high, sum low <= 1 <= sum high.

    c lies between two of the points where a share meets a bound; between them the sum is linear in c.
    """
    positive = shares > 0
    points = np.unique(np.concatenate((low[positive] / shares[positive], high[positive] / shares[positive])))
    sums = [np.clip(c * shares, low, high).sum() for c in points]
    at = int(np.searchsorted(sums, 1.0))
    if at == 0 or at == len(points):
        result = np.clip(points[min(at, len(points) - 1)] * shares, low, high)
    else:
        part = (1.0 - sums[at - 1]) / (sums[at] - sums[at - 1])
        result = np.clip((points[at - 1] + part * (points[at] - points[at - 1])) * shares, low, high)
    return result / result.sum()


def _by_domain(config: MixingBase, key: str, default: float, domains: list[str]) -> np.ndarray:
    value = getattr(config, key)
    if isinstance(value, dict):
        check_names(value, domains, f"mixing.{key}")
        return np.array([value.get(domain, default) for domain in domains], dtype=np.float64)
    return np.full(len(domains), default if value is None else value, dtype=np.float64)


# To spare, because a domain is looked at again and again: at two, one look in fifty would be wrong.
_STANDARD_ERRORS = 4.0


class SaturationMonitor:
    """Says which domains' losses no longer fall.

    A domain is saturated when the newer half of its last `window` losses is, with four standard errors to spare, less than `least_gain` (relative)
    below the older half; it is no longer when the newer half is that far below with as much to spare.
    """

    def __init__(self, config: Saturation, domains: int) -> None:
        self.config = config
        self.losses: list[list[float]] = [[] for _ in range(domains)]
        self.saturated = [False] * domains

    def observe(self, losses: dict[int, float]) -> list[int]:
        """Take a step's finite losses; returns the domains whose verdict changed."""
        changed, half = [], self.config.window // 2
        for domain, loss in losses.items():
            seen = self.losses[domain]
            seen.append(loss)
            if len(seen) < 2 * half:
                continue
            older, newer = np.array(seen[:half]), np.array(seen[half:])
            gain, error = older.mean() - newer.mean(), np.sqrt((older.var() + newer.var()) / half)
            least = self.config.least_gain * abs(older.mean())
            spare = _STANDARD_ERRORS * error
            verdict = True if gain + spare < least else False if gain - spare > least else self.saturated[domain]
            if verdict != self.saturated[domain]:
                self.saturated[domain] = verdict
                changed.append(domain)
            del seen[: max(half // 4, 1)]  # looked at again after a while, not at every loss
        return changed

    def factors(self) -> np.ndarray:
        """float64 [K] by which shares are multiplied."""
        return np.where(self.saturated, self.config.share_factor, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"losses": self.losses, "saturated": self.saturated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.losses = [list(losses or []) for losses in state["losses"]]
        self.saturated = [bool(verdict) for verdict in state["saturated"]]
