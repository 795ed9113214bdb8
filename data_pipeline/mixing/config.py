"""What a run can be told of its mixture: one model per policy, and what holds for all of them."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from regrowth.settings import Settings


def check_weights(weights: dict[str, float] | str) -> dict[str, float] | str:
    """Weights are shares: finite, not negative, and they sum to 1."""
    if isinstance(weights, str):
        return weights
    for domain, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of {domain} is {weight}; shares are finite and not negative")
    if abs(total := sum(weights.values()) - 1.0) > 1e-3:
        raise ValueError(f"the weights sum to {total + 1.0:.4g}; they are shares and sum to 1")
    return weights


Shares = Annotated[dict[str, float] | Literal["natural", "uniform"], AfterValidator(check_weights)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]


class Saturation(Settings):
    """Watches for domains whose loss no longer falls."""

    window: Annotated[int, Field(ge=8)] = 200  # losses of a domain that are looked at, an older half and a newer one
    least_gain: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.002  # relative fall from half to half below which a domain is saturated
    share_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # a saturated domain's share is multiplied by this; 1 only reports


class MixingBase(Settings):
    """Bounds on whatever a policy says. A single number holds for every domain, a table for those it names."""

    min_share: Share | dict[str, Share] | None = None
    max_share: Share | dict[str, Share] | None = None
    max_epochs: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    saturation: Saturation | None = None
    replay_log: Path | None = None  # a run whose decisions are followed step by step, on whatever plan

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "MixingBase":
        low, high = self.min_share, self.max_share
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise ValueError(f"min_share = {low} is above max_share = {high}")
        return self


class StaticMixing(MixingBase):
    """Fixed shares per domain: its share of the corpus's tokens, equal ones, or a table.

    A temperature flattens them: share to the power of 1 / temperature (Arivazhagan et al. 2019).
    """

    policy: Literal["static"] = "static"
    weights: Shares = "natural"
    temperature: Annotated[float, Field(gt=0)] = 1.0


class UniMaxMixing(MixingBase):
    """As uniform as a limit on epochs allows (Chung et al. 2023, arXiv 2304.09151)."""

    policy: Literal["unimax"]
    epochs: Annotated[float, Field(gt=0)] = 4.0
    budget_tokens: Annotated[int, Field(ge=1)] | None = None  # None: what the run trains on, run.steps times the tokens of a step


class MixingStage(Settings):
    """Shares from a step on."""

    at_step: Count
    weights: Shares


class ScheduleMixing(MixingBase):
    """Shares that follow a plan over the steps: held until the next stage, or moving to it in a straight line."""

    policy: Literal["schedule"]
    stages: list[MixingStage]
    interpolate: bool = False

    @field_validator("stages")
    @classmethod
    def _ascending(cls, value: list[MixingStage]) -> list[MixingStage]:
        steps = [stage.at_step for stage in value]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"at_step = {steps}: the first stage begins at step 0, and the others follow in ascending order")
        return value


class LearningMixing(MixingBase):
    """What the policies that learn have in common.

    reward     loss: the training loss, as published; decrease: how far the loss fell below its running mean; excess: the loss above a
               reference's loss on the same domain, at least 0. Irreducibly noisy domains win by `loss` and not by the other two.
    reference  for `excess`: a table of nats per token by domain, or a run whose last evaluation on held-out text is taken.
    """

    initial: Shares = "natural"
    warmup_steps: Count = 20  # at the initial mixture
    reward: Literal["loss", "decrease", "excess"] = "loss"
    reference: dict[str, float] | Path | None = None

    @model_validator(mode="after")
    def _has_a_reference(self) -> Any:
        if self.reward == "excess" and self.reference is None:
            raise ValueError('reward = "excess" needs a reference: a table of losses by domain, or the folder of a run')
        return self


class OdmMixing(LearningMixing):
    """Online data mixing: an EXP3-like bandit over domains (Albalak et al. 2023, arXiv 2312.02406)."""

    policy: Literal["odm"]
    form: Literal["paper", "released"] = "paper"
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9  # smoothing of the rewards
    # Where the rewards start: zero as published (a domain unseen early then collapses to the floor), or at the domain's first loss.
    initial_reward: Literal["zero", "first_loss"] = "first_loss"


class Exp3Mixing(LearningMixing):
    """EXP3 (Auer et al. 2002), the textbook bandit, as a baseline. Rewards are scaled to 0..1 by `reward_range`, and clipped."""

    policy: Literal["exp3"]
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1  # exploration, and the step
    reward_range: tuple[float, float] = (0.0, 10.0)

    @field_validator("reward_range")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"from {value[0]} to {value[1]}: the second has to be the larger")
        return value


class DoReMiMixing(LearningMixing):
    """Exponentiated gradient on the excess loss over a reference (DoReMi, Xie et al. 2023, arXiv 2305.10429), as an online policy."""

    policy: Literal["doremi"]
    reward: Literal["loss", "decrease", "excess"] = "excess"
    step_size: Annotated[float, Field(gt=0)] = 1.0
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # share of the uniform mixture


class AdoMixing(LearningMixing):
    """Adaptive data optimization: a scaling law per domain says who learns fastest (Jiang et al. 2024, arXiv 2410.11820).

    The published warm-up, first fit and refit are all 1,000 steps; shorter runs need shorter ones.
    """

    policy: Literal["ado"]
    reward: Literal["loss"] = "loss"  # the laws are of losses
    warmup_steps: Count = 1000
    refit_every: Annotated[int, Field(ge=1)] = 1000
    ignore_steps: Count = 500  # steps at the beginning that the law is not fitted to
    history_rate: Annotated[float, Field(gt=0, le=1)] = 0.1  # of the running mean of shares that credit is given by
    credit_power: Annotated[float, Field(ge=0)] = 0.5
    novelty: Annotated[float, Field(gt=0, le=1)] = 0.1  # share of the preference beside the running mean of the policy
    least_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    least_exponent: Annotated[float, Field(ge=0)] = 0.05


Mixing = Annotated[
    StaticMixing | UniMaxMixing | ScheduleMixing | OdmMixing | Exp3Mixing | DoReMiMixing | AdoMixing, Field(discriminator="policy")
]
