"""When a run grows: at a step, after so many tokens, or when its loss stops falling; and on which plan it goes on."""

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, model_validator

from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.growth.plan import GrowthPlan
from regrowth.pretrain.lineage import Lineage
from regrowth.settings import Settings, validate


class Plateau(Settings):
    """From one window of steps to the next, the mean training loss falls by less than a share of itself."""

    window: Annotated[int, Field(ge=2)] = 200
    least_fall: Annotated[float, Field(ge=0, lt=1)] = 0.01
    not_before: Annotated[int, Field(ge=0)] = 0  # step

    def reached(self, step: int, losses: Sequence[float]) -> bool:
        """Whether the last two windows say so.

        Args:
            losses: of the steps so far, the newest last.
        """
        if step < self.not_before or len(losses) < 2 * self.window:
            return False
        last = list(losses)[-2 * self.window :]
        before, now = fmean(last[: self.window]), fmean(last[self.window :])
        return before - now < self.least_fall * before


class GrowthEvent(GrowthPlan):
    """Grow the model before a step. Events happen in the order in which they stand: one whose time has come waits for those before it."""

    at_step: Annotated[int, Field(ge=0)] | None = None
    at_tokens: Annotated[float, Field(gt=0)] | None = None  # trained on in all, ancestors' included, as the lineage counts them
    at_plateau: Plateau | None = None
    parallel: dict[str, Any] = {}  # what changes in the parallel plan from here on

    @model_validator(mode="after")
    def _one_moment(self) -> "GrowthEvent":
        named = [key for key in ("at_step", "at_tokens", "at_plateau") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ValueError(f"{' and '.join(named) or 'no moment'} given; name one of at_step, at_tokens and at_plateau")
        return self

    @property
    def at(self) -> str:
        """The moment in words, which is how a lineage knows the event."""
        if self.at_plateau is not None:
            return f"plateau of {self.at_plateau.window} steps"
        return f"step {self.at_step}" if self.at_step is not None else f"{self.at_tokens:g} tokens"

    def describe(self) -> dict[str, Any]:
        """For the lineage: what to do again, and when it was."""
        return {**super().describe(), "at": self.at}

    def due(self, step: int, tokens: int, losses: Sequence[float]) -> bool:
        """Whether its time has come."""
        if self.at_plateau is not None:
            return self.at_plateau.reached(step, losses)
        return step >= self.at_step if self.at_step is not None else tokens >= (self.at_tokens or 0)

    def plan_after(self, plan: ParallelPlan) -> ParallelPlan:
        """The parallel plan from here on.

        Raises:
            UserError: a key that a plan does not have, or a value that it does not take.
        """
        return validate(ParallelPlan, {**plan.model_dump(), **self.parallel}, "parallel") if self.parallel else plan


def waiting(events: list[GrowthEvent], lineage: Lineage) -> list[GrowthEvent]:
    """The events of a run that have not happened yet, as its lineage tells."""
    happened = [str(parent.operator.get("at", f"step {parent.step}")) for parent in lineage.growths]
    left = []
    for event in events:
        if event.at in happened:
            happened.remove(event.at)
        else:
            left.append(event)
    return left


def plan_in_force(plan: ParallelPlan, events: list[GrowthEvent], lineage: Lineage) -> ParallelPlan:
    """The plan that a run is on, which its growths may have changed."""
    left = waiting(events, lineage)
    for event in events:
        if not any(event is other for other in left):
            plan = event.plan_after(plan)
    return plan
