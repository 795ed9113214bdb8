"""Growth in width by copying single neurons (bert2BERT, Chen et al. 2022, arXiv 2110.07143)."""

from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from regrowth.data_pipeline.order import uniforms
from regrowth.pretrain.growth.dims import dims, resized, size_of
from regrowth.pretrain.growth.maps import Axis, Term, pick
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator
from regrowth.pretrain.model_config import ModelConfig

Size = Annotated[int, Field(ge=1)] | None


class Bert2Bert(GrowthOperator):
    """New entries are copies of old ones drawn at random, g(i) = i for the old; what reads them divides by how often each was copied.

    fpi   function-preserving initialisation: a layer's new neurons copy its own.
    aki   advanced knowledge initialisation: they copy the next layer's, which breaks the symmetry.

    One g for the whole residual stream; heads are copied whole, with their KV head and all of its group. With RMSNorm even `fpi` preserves the function only
    where all entries are copied equally often.
    """

    op: Literal["fpi", "aki"] = "fpi"
    width: Size = None
    kv_heads: Size = None
    ffn_width: Size = None
    seed: int = 0

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """The sizes that are named; heads follow the KV heads, so that groups stay as large as they are."""
        if config.moe:
            raise ValueError(f"{self.op}: made for dense models; grow experts with duplicate_experts, or all widths with hyperclone")
        kv_heads = self.kv_heads or config.kv_heads
        grown = resized(
            config,
            width=self.width,
            kv_heads=kv_heads,
            heads=config.heads // config.kv_heads * kv_heads,
            ffn_width=self.ffn_width,
        )
        sizes = ("width", "kv_heads", "ffn_width")
        if smaller := [f"{key} = {getattr(grown, key)}" for key in sizes if getattr(grown, key) < getattr(config, key)]:
            raise ValueError(f"{self.op}: {', '.join(smaller)} is smaller than the model's: growing only adds")
        if grown == config:
            raise ValueError(f"{self.op}: name a size that is larger than the model's: {', '.join(sizes)}")
        return grown

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """The source's entries by g; with aki the new ones that are written are the next layer's."""
        kinds = dims(target)
        index = {d: self._copies(kind, config, grown) for d, kind in enumerate(kinds)}
        axes = {d: pick(g) for d, g in index.items()}
        if len(kinds) == 2 and target.rest != "embed.weight":
            axes[1] = _divided(index[1])
        if self.op == "fpi" or target.layer is None or len(kinds) == 1:
            return [Term(target, axes)]
        above = target.at_layer(min(target.layer + 1, config.layers - 1))
        old = np.arange(len(index[0])) < size_of(kinds[0], config)
        own, next_ = (pick(np.where(wanted, index[0], -1)) for wanted in (old, ~old))
        return [Term(target, {**axes, 0: own}), Term(above, {**axes, 0: next_})]

    def _copies(self, kind: str, config: ModelConfig, grown: ModelConfig) -> np.ndarray:
        """int64 [size in the target]: g."""
        if kind not in ("queries", "keys"):
            return _drawn(size_of(kind, config), size_of(kind, grown), self.seed, kind)
        groups = _drawn(config.kv_heads, grown.kv_heads, self.seed, "heads")
        size = config.head_dim * (config.heads // config.kv_heads if kind == "queries" else 1)
        return (groups[:, None] * size + np.arange(size)).flatten()


@lru_cache
def _drawn(size: int, to: int, seed: int, key: str) -> np.ndarray:
    drawn = (uniforms(to - size, seed, "bert2bert", key) * size).astype(np.int64)
    return np.concatenate((np.arange(size), drawn))


def _divided(index: np.ndarray) -> Axis:
    """What is read, divided by how often it was copied."""
    return pick(index, 1.0 / np.bincount(index)[index])
