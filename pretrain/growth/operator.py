"""Growth operators: a map from (config, weights, moments) to larger ones, described from the target's side.

An operator is its settings and its mathematics; the runner does the reading, the moments, the verification and the lineage.
"""

from typing import Any, Literal

from regrowth.pretrain.growth.maps import Term
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.model_config import ModelConfig, MoEConfig
from regrowth.settings import Settings

Moments = Literal["carry", "zero"]


class GrowthOperator(Settings):
    """What the runner needs of an operator; its fields are the keys of a `[[growth]]` table."""

    op: str

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """The target's config.

        Raises:
            ValueError: the operator does not fit the model; says what would.
        """
        raise NotImplementedError

    def preserves_function(self, config: ModelConfig) -> bool:
        """Whether the target computes what the source did, but for rounding."""
        return False

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """The parts that are added to make a target tensor; none: it is zero."""
        raise NotImplementedError


def with_layers(config: ModelConfig, sources: list[int]) -> ModelConfig:
    """A config whose layer i is of the kind of layer sources[i]."""
    changes: dict[str, Any] = {"layers": len(sources)}
    if config.moe:
        kinds = ["moe" if config.is_moe(source) else "dense" for source in sources]
        period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
        changes["moe"] = MoEConfig.model_validate({**config.moe.model_dump(), "pattern": kinds[:period]})
    return ModelConfig.model_validate({**config.model_dump(), **changes})
