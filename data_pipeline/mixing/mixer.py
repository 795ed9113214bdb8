"""The mixer: draws domains for a step's units from the policy, feeds it losses `update_delay` steps late, and logs every decision.

Draws come from a generator keyed by (seed, step, unit): they need no generator state and are the same on every rank, whatever the number
of ranks. Losses that the policy has not seen yet are part of the state, so a resumed run draws what the undisturbed one would have drawn.
The draw of step s sees the losses up to step s - update_delay, no more and no fewer, whenever it is made: so it may be made ahead.
"""

import math
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np

from regrowth.data_pipeline.mixing.limits import Limits, SaturationMonitor
from regrowth.data_pipeline.mixing.policy import Policy
from regrowth.data_pipeline.order import uniforms
from regrowth.errors import Exhausted

# Losses are rounded to this before a policy sees them, so that a different order of summation rarely changes a draw.
_LOSS_RESOLUTION = 2.0**-16


class Mixer:
    """A policy with its bounds, its draws, its pending losses and its log rows.

    Args:
        units: draws per step.
        limits: bounds on the shares; None: there are none.
    """

    def __init__(self, policy: Policy, domains: list[str], units: int, update_delay: int, seed: int,
                 limits: Limits | None = None, monitor: SaturationMonitor | None = None) -> None:  # fmt: skip
        self.policy, self.domains, self.units = policy, domains, units
        self.update_delay, self.seed = update_delay, seed
        self.limits, self.monitor = limits, monitor
        self.pending: list[dict[str, Any]] = []  # draws whose losses the policy has not had, oldest first
        self._verdicts: list[tuple[str, bool]] = []

    def may_draw(self, step: int) -> bool:
        """Whether all the losses are there that this step's draw has to see."""
        return not self.learns or all(e["losses"] is not None for e in self.pending if e["step"] <= step - self.update_delay)

    @property
    def learns(self) -> bool:
        """Whether draws depend on losses."""
        return self.policy.learns or (self.monitor is not None and self.monitor.config.share_factor < 1.0)

    def verdicts(self) -> list[tuple[str, bool]]:
        """Domains that the monitor found saturated, or no longer so, since this was asked last."""
        found, self._verdicts = self._verdicts, []
        return found

    def draw(self, step: int, room: np.ndarray | None = None) -> np.ndarray:
        """int64 [units]: the domain of each unit of this step.

        Args:
            room: float64 [K], units that may still be read of each domain; None: as many as one likes.

        Raises:
            Exhausted: no domain that the policy draws may be read any more.
        """
        self._learn_until(step - self.update_delay)
        probabilities = self._bounded(self.policy.probabilities(step), room, step)
        shares, chances = probabilities.tolist(), uniforms(self.units, self.seed, "mixing", step).tolist()
        if room is None or (room >= self.units).all():
            drawn = _pick(shares, chances)
        else:  # a domain may end within the step
            left, drawn = room.copy(), []
            for chance in chances:
                drawn += _pick(self._limited(probabilities, left, step).tolist(), [chance])
                left[drawn[-1]] -= 1
        self._pend(step, shares, drawn)
        return np.array(drawn)

    def follow(self, step: int, probabilities: list[float], drawn: list[int]) -> np.ndarray:
        """Take a step's draws from another run's log. The policy learns from them meanwhile, for when the log is left."""
        self._learn_until(step - self.update_delay)
        self._pend(step, probabilities, drawn)
        return np.array(drawn)

    def observe(self, step: int, losses: dict[int, float]) -> dict[str, Any]:
        """Take the mean loss of each drawn domain of a step; returns the step's log row."""
        entry = next(e for e in self.pending if e["step"] == step)
        entry["losses"] = {str(d): round(x / _LOSS_RESOLUTION) * _LOSS_RESOLUTION if math.isfinite(x) else x for d, x in losses.items()}
        return {key: entry[key] for key in ("step", "probabilities", "draws", "losses", "rewards")}

    def state_dict(self, next_step: int | None = None) -> dict[str, Any]:
        """JSON-able state between two steps: what was drawn ahead for `next_step` and later is left out, and will be drawn again."""
        if next_step is not None:
            self._learn_until(next_step - self.update_delay)  # as its draw will, or has
        pending = [e for e in self.pending if next_step is None or e["step"] < next_step]
        monitor = self.monitor.state_dict() if self.monitor else None
        return {
            "domains": self.domains,
            "kind": _kind(self.policy),
            "policy": self.policy.state_dict(),
            "monitor": monitor,
            "pending": pending,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Domains may have joined or left since; another policy begins afresh."""
        place = {name: i for i, name in enumerate(state["domains"])}
        moved = [place.get(name) for name in self.domains]  # where each domain was
        if state["kind"] == _kind(self.policy):
            self.policy.load_state_dict(_moved(state["policy"], self.policy.per_domain, moved))
            back = {str(old): str(new) for new, old in enumerate(moved) if old is not None}
            self.pending = [_moved_entry(entry, moved, back) for entry in state["pending"]]
        if self.monitor and state["monitor"]:
            self.monitor.load_state_dict(_moved(state["monitor"], {"losses": None, "saturated": False}, moved))

    def _bounded(self, probabilities: np.ndarray, room: np.ndarray | None, step: int) -> np.ndarray:
        if self.monitor and self.monitor.config.share_factor < 1.0:
            probabilities = probabilities * self.monitor.factors()
            probabilities = probabilities / probabilities.sum()
        return self._limited(probabilities, room, step)

    def _limited(self, probabilities: np.ndarray, room: np.ndarray | None, step: int) -> np.ndarray:
        if self.limits is None:
            return probabilities
        open_ = np.ones(len(self.domains), dtype=bool) if room is None else room >= 1.0
        if not (open_ & (probabilities > 0)).any():
            raise Exhausted(f"step {step}: every domain that the policy draws has been read as often as mixing.max_epochs allows. Raise it, "
                            f"add data, or end the run earlier (run.steps = {step}).")  # fmt: skip
        return self.limits.apply(probabilities, open_)

    def _learn_until(self, step: int) -> None:
        while self.pending and self.pending[0]["step"] <= step and self.pending[0]["losses"] is not None:
            due = self.pending.pop(0)
            losses = {int(d): x for d, x in due["losses"].items()}
            self.policy.update(losses, np.array(due["probabilities"]), np.bincount(due["draws"], minlength=len(self.domains)))
            if self.monitor:
                changed = self.monitor.observe({d: x for d, x in losses.items() if math.isfinite(x)})
                self._verdicts += [(self.domains[d], self.monitor.saturated[d]) for d in changed]

    def _pend(self, step: int, probabilities: list[float], drawn: list[int]) -> None:
        rewards = self.policy.rewards_now()
        self.pending.append({"step": step, "probabilities": probabilities, "draws": drawn, "losses": None, "rewards": rewards})


def _pick(shares: list[float], chances: list[float]) -> list[int]:
    edges = list(accumulate(shares))
    return [bisect_right(edges, chance * edges[-1], hi=len(edges) - 1) for chance in chances]


def _kind(policy: Policy) -> str:
    return type(policy).__name__


def _moved(state: dict[str, Any], per_domain: dict[str, Any], moved: list[int | None]) -> dict[str, Any]:
    """A state whose lists over domains follow another list of domains."""
    if moved == list(range(len(moved))):
        return state
    changed = dict(state)
    for key, default in per_domain.items():
        before = state[key]
        new = float(np.mean(before)) if default == "mean" else default
        changed[key] = [new if old is None else before[old] for old in moved]
    return changed


def _moved_entry(entry: dict[str, Any], moved: list[int | None], back: dict[str, str]) -> dict[str, Any]:
    """A pending draw, likewise: what was drawn of a domain that has left teaches nothing."""
    if moved == list(range(len(moved))):
        return dict(entry)
    shares = [0.0 if old is None else entry["probabilities"][old] for old in moved]
    losses = entry["losses"]
    return {
        **entry,
        "probabilities": shares,
        "draws": [int(back[str(d)]) for d in entry["draws"] if str(d) in back],
        "losses": None if losses is None else {back[d]: x for d, x in losses.items() if d in back},
    }
