"""The values that a `random_pad` fades in, step by step; every rank those of the parts that it holds."""

import torch

from regrowth.errors import UserError
from regrowth.kernels.random import normal, random_key
from regrowth.parallel.dtensor import local_global_index, local_tensor
from regrowth.parallel.engine import Engine
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.plan import plan_in_lineage
from regrowth.pretrain.growth.random_pad import RandomPad
from regrowth.pretrain.initialise import weight_std
from regrowth.pretrain.lineage import Lineage, Parent
from regrowth.pretrain.model_config import ModelConfig
from regrowth.settings import validate


class Ramp:
    """Adds the same part of the values after each of its steps.

    Args:
        first: the first step.
        parts: by canonical name what is added each time, of the shape that this rank holds.
    """

    def __init__(self, first: int, steps: int, parts: dict[str, torch.Tensor]) -> None:
        self.first, self.steps, self.parts = first, steps, parts

    def runs(self, step: int) -> bool:
        """Whether something is added after a step."""
        return self.first <= step < self.first + self.steps

    @torch.no_grad()
    def add(self, step: int, engine: Engine) -> None:
        """After the update of a step; outside of the ramp nothing."""
        if self.runs(step):
            weights = engine.weights()
            for name, part in self.parts.items():
                local_tensor(weights[name]).add_(part)
            engine.loaded(engine.optimizer_steps)  # copies of tied weights are made anew


def _ramp_steps(parent: Parent) -> int:
    operators = parent.operator.get("operators", [])
    return int(operators[-1].get("ramp_steps", 0)) if operators else 0


def ramp_of(lineage: Lineage, model: ModelConfig, weights: dict[str, torch.Tensor], step: int) -> Ramp | None:
    """The ramp that a run is on at a step, by its newest growth; None if there is none, or it is over.

    A growth counts from its step; one that was done offline from the first step of the run that starts with it.

    Raises:
        UserError: the run starts from a checkpoint amid another run's ramp.
    """
    if not lineage.parents:
        return None
    *before, last = lineage.parents
    first = last.step
    if last.relation == "continued from" and before:
        if before[-1].step == last.step:
            last, first = before[-1], 0
        elif last.step < before[-1].step + _ramp_steps(before[-1]):
            raise UserError(f"run.start_from: saved at step {last.step} amid the ramp of random_pad, which began at step {before[-1].step}; start from a "
                            "checkpoint before or after it.")  # fmt: skip
    if last.relation != "grown from" or "source" not in last.operator:
        return None
    plan = plan_in_lineage(last.operator, "lineage")
    operator = plan.operators[-1]
    assert isinstance(operator, RandomPad)
    if step >= first + operator.ramp_steps:
        return None
    small = plan.configs(validate(ModelConfig, last.operator["source"], "lineage"))[-2]
    parts = {}
    for name, weight in weights.items():
        ramped, std = operator.ramped(TensorName.parse(name), small, model), weight_std(name, model)
        if ramped is not None and std is not None and ramped.any():
            index, local = local_global_index(weight), local_tensor(weight)
            values = normal(random_key(plan.seed, "growth-ramp", name=name), index) * (std / operator.ramp_steps)
            parts[name] = (values * torch.from_numpy(ramped).flatten()[index]).to(local.device, local.dtype)
    return Ramp(first, operator.ramp_steps, parts)
