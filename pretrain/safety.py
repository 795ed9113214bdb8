"""What to do with a step that is not like the others: skip it, and if that does not help go back.

A step whose loss or gradient norm lies more than `skip_sigma` standard deviations above the last `window` steps makes no update (OLMo 2,
arXiv 2501.00656, section 3.2, skips so). Several in a row mean that the weights are spoilt, not a batch: the run returns to a checkpoint from before and
goes on with other data. All ranks decide alike, because they decide on sums over all of them.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from regrowth.settings import Settings


class SafetyConfig(Settings):
    """Outliers among steps."""

    skip_sigma: Annotated[float, Field(gt=0)] | None = 6.0  # None: only steps whose gradient is not finite are skipped
    window: Annotated[int, Field(ge=8)] = 128  # steps that an outlier is measured against
    rewind_after: Annotated[int, Field(ge=1)] = 5  # outliers in a row
    rewind_limit: Annotated[int, Field(ge=0)] = 3  # in a run; after that, ten steps in a row without an update end it
    give_up_after: Annotated[int, Field(ge=1)] = 10


class StepGuard:
    """Remembers losses and gradient norms, and says above which the next step is an outlier."""

    def __init__(self, config: SafetyConfig, remember: int = 0) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=max(config.window, remember))
        self.norms: deque[float] = deque(maxlen=config.window)
        self.in_a_row = 0
        self.rewinds = 0

    @property
    def loss_limit(self) -> float:
        """Above it, a loss is an outlier; infinity until the window is full."""
        return self._limit(self.losses)

    @property
    def norm_limit(self) -> float:
        """Above it, a gradient norm is an outlier."""
        return self._limit(self.norms)

    def _limit(self, values: Sequence[float]) -> float:
        if self.config.skip_sigma is None or len(values) < self.config.window:
            return math.inf
        values = list(values)[-self.config.window :]
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        return mean + self.config.skip_sigma * max(deviation, 1e-3 * abs(mean))

    def observe(self, loss: float, norm: float, updated: bool) -> None:
        """Take note of a step. Those without an update are no measure for others."""
        self.in_a_row = 0 if updated else self.in_a_row + 1
        if updated:
            self.losses.append(loss)
            self.norms.append(norm)

    @property
    def spoilt(self) -> bool:
        """Whether it is time to go back."""
        return self.in_a_row >= self.config.rewind_after and self.rewinds < self.config.rewind_limit

    def forget(self) -> None:
        """After a growth, steps are not comparable with those before."""
        self.losses.clear()
        self.norms.clear()
        self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state between two steps."""
        return {"losses": list(self.losses), "norms": list(self.norms), "in_a_row": self.in_a_row, "rewinds": self.rewinds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.losses = deque(state.get("losses", []), maxlen=self.losses.maxlen)
        self.norms = deque(state.get("norms", []), maxlen=self.config.window)
        self.in_a_row, self.rewinds = int(state.get("in_a_row", 0)), int(state.get("rewinds", 0))
