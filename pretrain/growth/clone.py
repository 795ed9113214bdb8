"""Growth in width by whole copies: HyperCloning (Samragh et al. 2024, arXiv 2409.12903)."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from regrowth.pretrain.growth.dims import dims, resized, size_of
from regrowth.pretrain.growth.maps import Axis, Noise, Term, pick, tile
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator
from regrowth.pretrain.model_config import ModelConfig

_KEPT = ("vocabulary", "experts", "head_dim")  # kinds of dims that are not cloned


class HyperClone(GrowthOperator):
    """Every activation `factor` times: the residual stream, heads, KV heads and hidden widths; the function stays, tied or not.

    A matrix is tiled and divided by the copies that it reads; embedding and norms are tiled. The head reads copies too; a tied one cannot be divided, so
    the final norm's gain is. A gradient reaches each copy of what is written with 1/factor of its size. `noise` (of a matrix's standard deviation) is
    added to one copy that is read and taken from another: the copies come to differ in training, and the function stays.
    """

    op: Literal["hyperclone"] = "hyperclone"
    factor: Annotated[int, Field(ge=2)] = 2
    noise: Annotated[float, Field(ge=0)] = 0.0

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """All widths and heads times `factor`; head_dim stays, and so do experts and vocabulary."""
        n, moe = self.factor, config.moe
        return resized(
            config,
            width=n * config.width,
            heads=n * config.heads,
            kv_heads=n * config.kv_heads,
            ffn_width=n * config.ffn_width,
            expert_width=n * moe.expert_width if moe else None,
            shared_width=n * moe.shared_width if moe else None,
        )

    def preserves_function(self, config: ModelConfig) -> bool:
        """Exactly."""
        return True

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """The tiled source, and its noise."""
        n, kinds = self.factor, dims(target)
        axes = {d: tile(size_of(kind, config), n) for d, kind in enumerate(kinds) if kind not in _KEPT}
        if kinds[-1] in _KEPT:
            return [Term(target)]
        if len(kinds) == 1 or target.rest == "embed.weight":
            if target.rest == "norm.weight" and config.tied:
                return [Term(target, axes, scale=1 / n)]
            return [Term(target, axes, gradient=1 / n)]
        axes[len(kinds) - 1] = tile(size_of(kinds[-1], config), n, scale=1 / n)
        parts = [Term(target, axes, gradient=1.0 if kinds[-2] in _KEPT else 1 / n)]
        if self.noise:
            shape = (*(size_of(kind, grown) for kind in kinds[:-1]), size_of(kinds[-1], config))
            drawn = Noise(self.noise, target, shape, str(target))
            parts.append(Term(drawn, {len(kinds) - 1: self._cancelling(shape[-1])}))
        return parts

    def _cancelling(self, size: int) -> Axis:
        """Copies with signs that sum to zero: +, -, +, -, ..., and 0 for an odd one out."""
        signs = np.array([0.0 if copy == self.factor - 1 and self.factor % 2 else (-1.0) ** copy for copy in range(self.factor)])
        return pick(np.tile(np.arange(size), self.factor), np.repeat(signs, size) / self.factor)
