"""Growth in width by random values that are faded in: the masked *random* width of the G_stack study (arXiv 2405.15319), after Yao et al. 2023 (arXiv 2305.02869).

There, what is new is drawn as at a model's start, and a mask on its outputs goes from 0 to 1. Here the mask stands in the weights: the growth is `zero_pad`, which is
the mask at 0, and after each step of the ramp the trainer adds a part of the values that a mask at 1 would show. So no kernel, split or checkpoint knows of masks. Two
things differ: the optimizer moves what is masked as fast as the rest, and RMSNorm's mean is over all entries at once, as after the ramp.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from regrowth.pretrain.growth.dims import dims, size_of
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.zero_pad import Padding
from regrowth.pretrain.model_config import ModelConfig


class RandomPad(Padding):
    """`zero_pad`, whose zeros become random values over `ramp_steps` steps of training."""

    op: Literal["random_pad"] = "random_pad"
    ramp_steps: Annotated[int, Field(ge=1)] = 100

    def ramped(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> np.ndarray | None:
        """bool, of the target's shape: what is zero after the growth and drawn at the end of the ramp; None for vectors."""
        kinds = dims(target)
        if len(kinds) == 1:
            return None
        new = [np.array(self.places(kind, config, grown)) < 0 for kind in kinds]
        shape = tuple(size_of(kind, grown) for kind in kinds)
        along = [np.broadcast_to(n.reshape([-1 if i == d else 1 for i in range(len(kinds))]), shape) for d, n in enumerate(new)]
        written, read = along[-2], along[-1]
        drawn = np.zeros(shape, dtype=bool)
        if target.rest != "embed.weight":
            drawn |= ~written & read if kinds[-1] == "width" else False
            drawn |= written if kinds[-2] != "width" else False
        return (written | read) & ~drawn
