"""What low precision remembers during a run: the history of delayed scales, and the linears that went wide because they lost too much."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from regrowth.errors import UserError
from regrowth.kernels.recipe import PrecisionRecipe
from regrowth.kernels.tables import AmaxHistory, RoundingErrors
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.precision import linear_names, matrices_of


class PrecisionState:
    """Of one model size; the same on every rank."""

    def __init__(self, recipe: PrecisionRecipe, model: ModelConfig, seed: int, device: torch.device) -> None:
        self.planned, self.seed = recipe, seed
        self.recipe = PrecisionRecipe(name="unset")  # in force
        self.fallen: list[str] = []
        self.slow: list[str] | None = None  # wide because low precision would be slower on this device; None until it is measured
        self.begins_anew = False  # whether delayed scales were looked for in a checkpoint that has none
        names = [part for name in linear_names(model) for part in matrices_of(name)]
        self.history = AmaxHistory(names, recipe.history, device) if recipe.history else None
        self._errors = RoundingErrors(names, device) if recipe.fallback else None

    def begin_step(self, modules: Iterable[nn.Module], step: int, steps: int) -> PrecisionRecipe:
        """Let a rank's linears follow what is in force at a step, and draw what is drawn for it."""
        recipe = self.planned.at(step, steps)
        wide = (*self.fallen, *(self.slow or ()))
        recipe = replace(recipe, wide=(*recipe.wide, *wide)) if wide else recipe
        if recipe != self.recipe or recipe.draws or self._errors is not None:
            for module in modules:
                module.follow(recipe, self.seed, step, self.history, self._errors if self._measures(step) else None)  # pyright: ignore[reportCallIssue]
            self.recipe = recipe
        return recipe

    def end_step(self, step: int, updated: bool = True) -> tuple[dict[str, dict[str, float]], list[str]]:
        """Errors of rounding by linear and operand, where the step measured them, and the linears that go wide from now on; collective.

        Args:
            updated: whether the step counted; one that was skipped decides nothing.
        """
        if self.history is not None and not self.recipe.is_full:
            self.history.end_step()
        if self._errors is None or not self._measures(step):
            return {}, []
        assert self.planned.fallback is not None
        errors = self._errors.collect()
        # Experts go wide as one.
        past = {_linear(name): name for name, its in errors.items() if self.planned.fallback.exceeded(its)}
        fallen = [linear for linear in past if linear not in self.fallen] if updated else []
        self.fallen += fallen
        errors |= {linear: errors[past[linear]] for linear in fallen}
        return errors, fallen

    def _measures(self, step: int) -> bool:
        return self.planned.fallback is not None and step % self.planned.fallback.every == 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; nothing where nothing is remembered."""
        scales = self.history.state_dict() if self.history is not None else {}
        state = {key: value for key, value in (("scales", scales), ("wide", self.fallen), ("slow", self.slow)) if value}
        return {**state, "recipe": self.planned.name} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint remembers; without scales, they begin with those of the first step's own values.

        Raises:
            UserError: the scales are another model's.
        """
        if state.get("recipe") == self.planned.name:  # what another recipe lost says nothing of this one
            self.fallen, self.slow = list(state.get("wide", [])), state.get("slow")
        if self.history is not None:
            self.begins_anew = not state.get("scales")
            try:
                self.history.load_state_dict(state.get("scales", {}))
            except ValueError as error:
                raise UserError(
                    f"the checkpoint's trainer.json: {error}. Resume with another precision.recipe, or from another checkpoint."
                ) from error


def _linear(name: str) -> str:
    """The name that a recipe knows it by."""
    return name.rpartition(".")[0] if ".experts." in name else name
