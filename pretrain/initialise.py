"""Counter-based initialisation: a weight is a function of (seed, canonical name, global element index), so every split starts equal."""

import math

import torch
from torch import nn

from regrowth.kernels.random import normal, random_key
from regrowth.parallel.dtensor import local_global_index, local_tensor
from regrowth.pretrain.model_config import ModelConfig


def weight_std(name: str, config: ModelConfig) -> float | None:
    """The standard deviation a parameter starts with; None for norm gains, which start at one.

    Projections into the residual stream are scaled by 1/sqrt(2 layers) (GPT-2).
    """
    if name.endswith("norm.weight"):
        return None
    into_residual = name.endswith(("attn.wo.weight", "ffn.w_down.weight"))
    return config.init_std / math.sqrt(2 * config.layers) if into_residual else config.init_std


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter in place; sharded parameters fill what they hold. Computed on the CPU, so that devices agree."""
    for name, parameter in model.named_parameters():
        local = local_tensor(parameter)
        std = weight_std(name, config)
        if std is None:
            local.fill_(1.0)
        else:
            values = normal(random_key(seed, "init", name=name), local_global_index(parameter))
            local.copy_((values * std).to(local.dtype))
