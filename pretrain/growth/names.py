"""Canonical names of weights, split at their layer."""

import re
from dataclasses import dataclass


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
