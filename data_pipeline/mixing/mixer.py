"""The mixer: draws domains for a step's units from the policy, feeds it losses `update_delay` steps late, and logs every decision.

Draws come from a generator keyed by (seed, step, unit): they need no generator state and are the same on every rank, whatever the number
of ranks. Losses that the policy has not seen yet are part of the state, so a resumed run draws what the undisturbed one would have drawn.
"""

import math
from typing import Any

import numpy as np

from regrowth.data_pipeline.mixing.policy import Policy
from regrowth.data_pipeline.order import key64

# Losses are rounded to this before a policy sees them, so that a different order of summation rarely changes a draw.
_LOSS_RESOLUTION = 2.0**-16


class Mixer:
    """A policy with its draws, its pending losses and its log."""

    def __init__(self, policy: Policy, domains: list[str], units: int, update_delay: int, seed: int) -> None:
        self.policy, self.domains, self.units = policy, domains, units
        self.update_delay, self.seed = update_delay, seed
        self.pending: list[dict[str, Any]] = []  # draws whose losses the policy has not had, oldest first

    def draw(self, step: int) -> np.ndarray:
        """int64 [units]: the domain of each unit of this step."""
        probabilities = self.policy.probabilities()
        edges = np.cumsum(probabilities)
        uniforms = np.array([key64(self.seed, "mixing", step, unit) / 2.0**64 for unit in range(self.units)])
        drawn = np.minimum(np.searchsorted(edges, uniforms * edges[-1], side="right"), len(edges) - 1)
        self.pending.append({"step": step, "probabilities": probabilities.tolist(), "draws": drawn.tolist(), "losses": None})
        return drawn

    def observe(self, step: int, losses: dict[int, float]) -> dict[str, Any]:
        """Take the mean loss of each drawn domain of a step, update the policy with what is due, return the step's log row."""
        rounded = {d: round(x / _LOSS_RESOLUTION) * _LOSS_RESOLUTION if math.isfinite(x) else x for d, x in losses.items()}
        entry = next(e for e in self.pending if e["step"] == step)
        entry["losses"] = {str(d): x for d, x in rounded.items()}
        while self.pending and self.pending[0]["step"] <= step + 1 - self.update_delay and self.pending[0]["losses"] is not None:
            due = self.pending.pop(0)
            self.policy.update({int(d): x for d, x in due["losses"].items()}, np.array(due["probabilities"]))
        return {"step": step, "probabilities": entry["probabilities"], "draws": entry["draws"], "losses": entry["losses"]}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state between two steps."""
        return {"policy": self.policy.state_dict(), "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.policy.load_state_dict(state["policy"])
        self.pending = [dict(entry) for entry in state["pending"]]
