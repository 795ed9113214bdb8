"""Where a run's time went: steps that count, steps that were done again, and what stood still and why."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Uptime:
    """Seconds of a run's life, from its first start to its last sign. `down` is between a stop or a failure and the first step after it."""

    life: float
    steps: float  # steps that count
    down: dict[str, float]  # by cause
    again: float  # steps that were lost and done again
    failures: int

    @property
    def goodput(self) -> float:
        """Share of the life that was spent in steps that count. The rest: what is named here, start-up, evaluations, checkpoints."""
        return self.steps / self.life if self.life else 0.0


def uptime(metrics: Rows, events: Rows) -> Uptime | None:
    """From a run's logs; None before its first step.

    Time is the clock of the host that wrote the events: one that was set back shows as no time at all.
    """
    times = [event["time"] for event in events if "time" in event]
    if not metrics or not times:
        return None
    ended = {"failed": _cause, "stopped": lambda event: "stopped on request", "replanned": lambda event: "other ranks after a growth"}
    down: dict[str, float] = {}
    for event, following in pairwise([event for event in events if event["event"] in (*ended, "resumed")]):
        if event["event"] in ended:
            cause = ended[event["event"]](event)
            down[cause] = down.get(cause, 0.0) + max(0.0, following["time"] - event["time"])
    return Uptime(
        life=max(0.0, max(times) - min(times)),
        steps=sum(row["seconds"] for row in metrics),
        down=down,
        again=sum(event.get("lost_seconds", 0.0) for event in events if event["event"] == "failed"),
        failures=sum(event["event"] == "failed" for event in events),
    )


def _cause(event: dict[str, Any]) -> str:
    """A failure's kind, by the words of its letter."""
    reason = str(event.get("reason", ""))
    for sign, cause in (("hung", "a rank hung"), ("was killed", "a rank was killed"), ("waited in vain", "a rank hung")):
        if sign in reason:
            return cause
    return "a rank failed"
