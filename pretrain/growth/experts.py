"""Growth of experts: more of them from those there are, or the first ones from a dense model."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from regrowth.pretrain.growth.dims import dims, resized, size_of
from regrowth.pretrain.growth.maps import Fresh, Noise, Term, pick, tile
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator
from regrowth.pretrain.model_config import ModelConfig, MoEConfig


class DuplicateExperts(GrowthOperator):
    """E -> factor E experts and k -> factor k choices (orthogonal growth in width, arXiv 2510.08008), noise on the copies alone.

    Copies of an expert score alike, so a token that chose it now chooses all of them. Their weights sum to what one had where they are normalised, and with a
    softmax, whose values are shared among the copies; plain sigmoids would add up, so `model.moe.scale` is divided. The bias that balances loads begins
    at zero again. Without noise, and if that bias was zero, the function stays.
    """

    op: Literal["duplicate_experts"] = "duplicate_experts"
    factor: Annotated[int, Field(ge=2)] = 2
    noise: Annotated[float, Field(ge=0)] = 0.01  # of each tensor's standard deviation, on experts and router rows

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """More experts, more choices."""
        if not config.moe or not config.expert_count:
            raise ValueError("duplicate_experts: the model has no experts; make some from its feed-forwards with upcycle")
        moe = config.moe
        adds_up = moe.gate == "sigmoid" and not moe.normalize
        return resized(
            config,
            experts=self.factor * moe.experts,
            top_k=self.factor * moe.top_k,
            scale=moe.scale / self.factor if adds_up else moe.scale,
        )

    def preserves_function(self, config: ModelConfig) -> bool:
        """Without noise, and unless experts are balanced by a bias, which is zeroed."""
        return self.noise == 0 and bool(config.moe and config.moe.bias_rate == 0)

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """Experts and router rows over and over; the rest as it is."""
        kinds = dims(target)
        if kinds[0] != "experts":
            return [Term(target)]
        if target.rest == "ffn.router.bias":
            return []
        assert config.moe
        experts = config.moe.experts
        parts = [Term(target, {0: tile(experts, self.factor, gradient=1 / self.factor)})]
        if self.noise:
            shape = tuple(size_of(kind, grown) for kind in kinds)
            index = np.arange(shape[0])
            parts.append(Term(Noise(self.noise, target, shape, str(target)), {0: pick(np.where(index < experts, -1, index))}))
        return parts


class Upcycle(GrowthOperator):
    """Dense -> mixture of experts (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert begins as the feed-forward, the router afresh.

    The chosen experts' weights are normalised: whatever the router says, the function stays. `noise` on the experts makes them differ.
    """

    op: Literal["upcycle"] = "upcycle"
    experts: Annotated[int, Field(ge=2)] = 8
    top_k: Annotated[int, Field(ge=1)] = 2
    pattern: Annotated[list[Literal["dense", "moe"]], Field(min_length=1)] = ["moe"]
    noise: Annotated[float, Field(ge=0)] = 0.0

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """The feed-forward's width becomes an expert's."""
        if config.moe:
            raise ValueError("upcycle: the model has experts already; duplicate_experts makes more of them")
        moe = MoEConfig(experts=self.experts, top_k=self.top_k, expert_width=config.ffn_width, pattern=self.pattern)
        return ModelConfig.model_validate({**config.model_dump(), "moe": moe.model_dump()})

    def preserves_function(self, config: ModelConfig) -> bool:
        """Without noise."""
        return self.noise == 0

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """The feed-forward, as often as there are experts."""
        if target.rest == "ffn.router.weight":
            return [Term(Fresh(config.init_std, (self.experts, config.width), str(target)))]
        if target.rest == "ffn.router.bias":
            return []
        if not target.rest.startswith("ffn.experts."):
            return [Term(target)]
        dense = TensorName(target.layer, f"ffn.{target.rest.removeprefix('ffn.experts.')}.weight")
        parts = [Term(dense, {0: pick([0] * self.experts, gradient=1 / self.experts)}, new_dim=True)]
        if self.noise:
            shape = tuple(size_of(kind, grown) for kind in dims(target))
            parts.append(Term(Noise(self.noise, dense, shape, str(target))))
        return parts
