"""Growth in depth by stacking."""

from dataclasses import dataclass
from typing import Any

from regrowth.pretrain.growth.operator import Source, TensorName
from regrowth.pretrain.model_config import ModelConfig


@dataclass(frozen=True)
class Stack:
    """G_stack: M' = M . M . ... . M, `factor` copies in depth; embedding, final norm and head once (Du et al. 2024, arXiv 2405.15319, eq. 1)."""

    factor: int = 2

    @property
    def preserves_function(self) -> bool:
        """Stacking changes the outputs; training recovers within few steps."""
        return False

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """`factor` times the layers."""
        return config.model_copy(update={"layers": config.layers * self.factor})

    def source(self, target: TensorName, config: ModelConfig) -> Source:
        """Layer i comes from layer i mod L."""
        return Source(target if target.layer is None else target.at_layer(target.layer % config.layers))

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"op": "stack", "factor": self.factor}
