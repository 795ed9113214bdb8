"""Growth in depth: whole layers are repeated, behind all others or each in its place."""

from typing import Annotated, Literal

from pydantic import Field

from regrowth.pretrain.growth.maps import Term
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator, with_layers
from regrowth.pretrain.model_config import ModelConfig

INTO_RESIDUAL = ("attn.wo.weight", "ffn.w_down.weight", "ffn.experts.w_down", "ffn.shared.w_down.weight")


class _Depth(GrowthOperator):
    """Repeats layers. `zero_copies` zeroes what a copy adds to the residual stream (W_O and W_down): then it changes nothing until it is trained, and its
    moments begin at zero."""

    zero_copies: bool = False

    def sources(self, layers: int) -> list[tuple[int, bool]]:
        """For each target layer the source layer, and whether it is a copy of one that stands already."""
        raise NotImplementedError

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """More layers, each of its source's kind."""
        return with_layers(config, [source for source, _ in self.sources(config.layers)])

    def preserves_function(self, config: ModelConfig) -> bool:
        """Only if the copies add nothing."""
        return self.zero_copies

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """Each tensor is its source's, as it is."""
        if target.layer is None:
            return [Term(target)]
        layer, copy = self.sources(config.layers)[target.layer]
        silent = self.zero_copies and copy
        if silent and target.rest in INTO_RESIDUAL:
            return []
        return [Term(target.at_layer(layer), gradient=0.0 if silent else 1.0)]


class Stack(_Depth):
    """G_stack: M' = M . M . ... . M; embedding, final norm and head once (Du et al. 2024, arXiv 2405.15319, eq. 1).

    `layers` in the place of `factor` need not be a multiple: the last copy is then cut.
    """

    op: Literal["stack"] = "stack"
    factor: Annotated[int, Field(ge=2)] = 2
    layers: Annotated[int, Field(ge=1)] | None = None

    def sources(self, layers: int) -> list[tuple[int, bool]]:
        """Layer i comes from layer i mod L."""
        target = self.layers or layers * self.factor
        if target <= layers:
            raise ValueError(f"stack: layers = {target} is no growth of a model of {layers} layers; name more")
        return [(i % layers, i >= layers) for i in range(target)]


class Interpose(_Depth):
    """Each layer `factor` times in its place (1, 1, 2, 2, ...; orthogonal growth, arXiv 2510.08008), the first and last ones once if asked.

    With `zero_copies` this is the insertion of identities.
    """

    op: Literal["interpose"] = "interpose"
    factor: Annotated[int, Field(ge=2)] = 2
    keep_first: Annotated[int, Field(ge=0)] = 0
    keep_last: Annotated[int, Field(ge=0)] = 0

    def sources(self, layers: int) -> list[tuple[int, bool]]:
        """Layer by layer."""
        if self.keep_first + self.keep_last >= layers:
            raise ValueError(
                f"interpose: keep_first = {self.keep_first} and keep_last = {self.keep_last} leave none of {layers} layers to be repeated"
            )
        once = [i < self.keep_first or i >= layers - self.keep_last for i in range(layers)]
        return [(i, copy > 0) for i in range(layers) for copy in range(1 if once[i] else self.factor)]
