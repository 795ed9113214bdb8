"""Growth operators: a pure map from (config, state) to (config, state), described from the target's side.

For each target tensor an operator lists its sources; the runner does the reading, the moments, the verification and the lineage, so that an
operator is only its mathematics. The moments of a copied tensor are copied with it.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from regrowth.pretrain.checkpoint import canonical_shapes, has_moments
from regrowth.pretrain.model_config import ModelConfig


@dataclass(frozen=True)
class TensorName:
    """A canonical name, split at its layer: `layers.3.attn.wq.weight` is (3, "attn.wq.weight"); others have no layer."""

    layer: int | None
    rest: str

    @classmethod
    def parse(cls, name: str) -> "TensorName":
        """From the canonical name."""
        match = re.match(r"layers\.(\d+)\.(.*)$", name)
        return cls(int(match[1]), match[2]) if match else cls(None, name)

    def at_layer(self, layer: int) -> "TensorName":
        """The same tensor of another layer."""
        return TensorName(layer, self.rest)

    def __str__(self) -> str:
        return self.rest if self.layer is None else f"layers.{self.layer}.{self.rest}"


@dataclass(frozen=True)
class Source:
    """A source tensor, taken as it is."""

    name: TensorName


class GrowthOperator(Protocol):
    """What the runner needs of an operator."""

    @property
    def preserves_function(self) -> bool: ...

    def grow_config(self, config: ModelConfig) -> ModelConfig: ...

    def source(self, target: TensorName, config: ModelConfig) -> Source: ...

    def describe(self) -> dict[str, Any]: ...


def grow_state(
    operator: GrowthOperator, config: ModelConfig, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]
) -> tuple[ModelConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The target's config, weights and moments.

    Args:
        config: the source model's.
        weights: canonical name -> tensor.
        moments: `{canonical name}.exp_avg` and `.exp_avg_sq` -> tensor.
    """
    grown = operator.grow_config(config)
    new_weights, new_moments = {}, {}
    for name, shape in canonical_shapes(grown).items():
        source = str(operator.source(TensorName.parse(name), config).name)
        assert weights[source].shape == shape, f"{name} {tuple(shape)} from {source} {tuple(weights[source].shape)}"
        new_weights[name] = weights[source].clone()
        for moment in ("exp_avg", "exp_avg_sq") if has_moments(name) else ():
            new_moments[f"{name}.{moment}"] = moments[f"{source}.{moment}"].clone()
    return grown, new_weights, new_moments
