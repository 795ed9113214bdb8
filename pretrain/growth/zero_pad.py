"""Growth in width by zeros: what is new writes nothing yet, so the function stays (LEMON, Wang et al. 2023, arXiv 2310.07999)."""

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from regrowth.pretrain.growth.dims import dims, resized, size_of
from regrowth.pretrain.growth.maps import Fresh, Term, pick
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator
from regrowth.pretrain.model_config import ModelConfig

Size = Annotated[int, Field(ge=1)] | None
_SIZES = ("width", "heads", "kv_heads", "ffn_width", "expert_width", "shared_width")


class Padding(GrowthOperator):
    """Residual width, heads, KV heads and hidden widths, each on its own.

    New entries of the residual stream are written as zeros and read with fresh weights; new heads and hidden units are written with fresh weights and read
    as zeros: nothing changes, and gradients reach all that is new. RMSNorm's mean is over more entries: its gain is multiplied by sqrt(d / D) and its eps by
    d / D (with qk-norm, whose eps is the same key, this is exact up to eps). New KV heads are new where heads grow in the same
    proportion, with the new heads to read them; else they are copies, each read by a part of the group.
    """

    width: Size = None
    heads: Size = None
    kv_heads: Size = None
    ffn_width: Size = None
    expert_width: Size = None
    shared_width: Size = None

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """The sizes that are named."""
        sizes = self.model_dump(include=set(_SIZES), exclude_none=True)
        before = {**config.model_dump(), **(config.moe.model_dump() if config.moe else {})}
        if unknown := [key for key in sizes if key not in before]:
            raise ValueError(f"{self.op}: {unknown[0]} is a size of experts, and the model has none")
        if smaller := [f"{key} = {size} (now {before[key]})" for key, size in sizes.items() if size < before[key]]:
            raise ValueError(f"{self.op}: {', '.join(smaller)}: growing only adds")
        grown = resized(config, **sizes, norm_eps=config.norm_eps * config.width / (self.width or config.width))
        if grown == config:
            raise ValueError(f"{self.op}: name a size that is larger than the model's: {', '.join(_SIZES)}")
        if not _new_groups(config, grown) and (grown.kv_heads % config.kv_heads or config.heads % grown.kv_heads):
            allowed = [k for k in range(config.kv_heads, config.heads + 1, config.kv_heads) if config.heads % k == 0]
            raise ValueError(
                f"{self.op}: kv_heads = {grown.kv_heads}: choose from {', '.join(map(str, allowed))}, so that every head keeps its keys, or let heads and "
                "kv_heads grow by one factor"
            )
        return grown

    def preserves_function(self, config: ModelConfig) -> bool:
        """Exactly, but for the eps of qk-norm if the width grows."""
        return True

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """The source in its place, and fresh values where they are read from or written to nothing."""
        kinds = dims(target)
        places = {d: self.places(kind, config, grown) for d, kind in enumerate(kinds)}
        sizes = tuple(size_of(kind, grown) for kind in kinds)
        if kinds == ("width",):
            down = math.sqrt(config.width / grown.width)
            index = np.arange(grown.width)
            new = np.where(index < config.width, -1, index % config.width)
            old = Term(target, {0: pick(places[0])}, scale=down, gradient=1 / down)
            return [old, Term(target, {0: pick(new)}, scale=down, gradient=0.0)]
        parts = [Term(target, {d: pick(index) for d, index in places.items()})]
        if len(kinds) == 1 or target.rest == "embed.weight":
            return parts
        written, read = len(kinds) - 2, len(kinds) - 1
        is_new = {d: np.array(places[d]) < 0 for d in (written, read)}

        def fresh(where: dict[int, np.ndarray]) -> Term:
            axes = {d: pick(np.where(wanted, np.arange(sizes[d]), -1)) for d, wanted in where.items()}
            return Term(Fresh(config.init_std, sizes, str(target)), axes)

        if kinds[read] == "width" and is_new[read].any():  # reads what is zero
            parts.append(fresh({written: ~is_new[written], read: is_new[read]}))
        if kinds[written] != "width" and is_new[written].any():  # is read as zero
            parts.append(fresh({written: is_new[written]}))
        return parts

    def places(self, kind: str, config: ModelConfig, grown: ModelConfig) -> list[int]:
        """The source entry of each target entry of a dim, -1 where there is none."""
        if kind in ("queries", "keys") and _new_groups(config, grown):
            before, after = (config.heads, grown.heads) if kind == "queries" else (config.kv_heads, grown.kv_heads)
            heads = [i if i < before else -1 for i in range(after)]
        elif kind == "queries":
            before, after = config.heads // grown.kv_heads, grown.heads // grown.kv_heads  # heads that read one KV head
            heads = [group * before + i if i < before else -1 for group in range(grown.kv_heads) for i in range(after)]
        elif kind == "keys":
            heads = [i * config.kv_heads // grown.kv_heads for i in range(grown.kv_heads)]
        else:
            size = size_of(kind, config)
            return [i if i < size else -1 for i in range(size_of(kind, grown))]
        return [-1 if head < 0 else head * config.head_dim + i for head in heads for i in range(config.head_dim)]


class ZeroPad(Padding):
    """What is new stays at zero until it is trained."""

    op: Literal["zero_pad"] = "zero_pad"


def _new_groups(config: ModelConfig, grown: ModelConfig) -> bool:
    """Whether the new heads come with KV heads of their own, in groups as large as those there are."""
    return grown.kv_heads > config.kv_heads and grown.heads * config.kv_heads == config.heads * grown.kv_heads
