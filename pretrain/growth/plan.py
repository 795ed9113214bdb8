"""Which growth: one operator, or a chain of them in a TOML file."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from regrowth.errors import UserError
from regrowth.pretrain.growth.bert2bert import Bert2Bert
from regrowth.pretrain.growth.clone import HyperClone
from regrowth.pretrain.growth.depth import Interpose, Stack
from regrowth.pretrain.growth.experts import DuplicateExperts, Upcycle
from regrowth.pretrain.growth.operator import Moments
from regrowth.pretrain.growth.random_pad import RandomPad
from regrowth.pretrain.growth.vocabulary import GrowVocabulary
from regrowth.pretrain.growth.zero_pad import ZeroPad
from regrowth.pretrain.model_config import ModelConfig
from regrowth.settings import Settings, validate

Operator = Annotated[
    Stack | Interpose | HyperClone | ZeroPad | RandomPad | Bert2Bert | DuplicateExperts | Upcycle | GrowVocabulary,
    Field(discriminator="op"),
]

_OWN = ("moments", "scales", "seed")


class GrowthPlan(Settings):
    """Operators, one after the other, and what becomes of the optimizer's moments."""

    operators: Annotated[list[Operator], Field(min_length=1)] = [Stack()]
    moments: Moments = "carry"  # by each operator's rule; "zero": they begin at zero
    scales: Literal["reset", "carry"] = (
        "reset"  # delayed scales of low precision: from the first step's own values, or those of the linear that one comes from
    )
    seed: int = 0  # of noise and fresh weights

    @model_validator(mode="after")
    def _ramps_come_last(self) -> "GrowthPlan":
        if any(operator.op == "random_pad" for operator in self.operators[:-1]):
            raise ValueError("random_pad changes weights while the run goes on: it can only be the last of a chain")
        return self

    def describe(self) -> dict[str, Any]:
        """For the lineage: enough to do it again."""
        named = [operator.model_dump(mode="json", exclude_none=True) for operator in self.operators]
        return {
            "op": " + ".join(operator.op for operator in self.operators),
            "operators": named,
            "moments": self.moments,
            **(
                {"scales": self.scales} if self.scales != "reset" else {}
            ),  # a key that came later; what was grown before it is still verified
            "seed": self.seed,
        }

    def preserves_function(self, config: ModelConfig) -> bool:
        """Whether all of it leaves the function as it is."""
        return all(operator.preserves_function(shape) for operator, shape in zip(self.operators, self.configs(config), strict=False))

    def configs(self, config: ModelConfig) -> list[ModelConfig]:
        """The source's config and that after each operator.

        Raises:
            UserError: an operator does not fit; names it and says what would.
        """
        shapes = [config]
        for operator in self.operators:
            try:
                shapes.append(operator.grow_config(shapes[-1]))
            except ValidationError as error:  # a config that the operator made, with the model's own check
                told = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
                raise UserError(f"growth: {operator.op}: {told}") from error
            except ValueError as error:
                raise UserError(f"growth: {error}") from error
        return shapes


def plan_in_lineage(operator: dict[str, Any], origin: str) -> GrowthPlan:
    """The plan that a lineage describes, so that it can be done again; one from before a key was there did what is the default now."""
    return validate(GrowthPlan, {key: operator[key] for key in ("operators", *_OWN) if key in operator}, origin)


def plan_of(settings: dict[str, Any], origin: str) -> GrowthPlan:
    """A plan of one operator, from the operator's keys and the plan's own.

    Raises:
        UserError: there is no such operator, or a key that is none of its own.
    """
    own = {key: settings[key] for key in _OWN if key in settings}
    return validate(GrowthPlan, {"operators": [{"op": "stack"} | {k: v for k, v in settings.items() if k not in own}], **own}, origin)
