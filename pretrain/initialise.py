"""Counter-based initialisation: a weight is a function of (seed, canonical name, global element index), so every split starts equal."""

import math

import torch

from regrowth.kernels.random import normal, random_key
from regrowth.parallel.dtensor import local_global_index, local_tensor
from regrowth.pretrain.model_config import ModelConfig


def weight_std(name: str, config: ModelConfig) -> float | None:
    """The standard deviation a parameter starts with; None for what starts constant: norm gains at one, routers' biases at zero.

    Projections into the residual stream are scaled by 1/sqrt(2 layers) (GPT-2).
    """
    if name.endswith(("norm.weight", "router.bias")):
        return None
    into_residual = name.endswith(("attn.wo.weight", "w_down.weight", "experts.w_down"))
    return config.init_std / math.sqrt(2 * config.layers) if into_residual else config.init_std


@torch.no_grad()
def initialise(weights: dict[str, torch.Tensor], config: ModelConfig, seed: int) -> None:
    """Fill canonical weights in place; of sharded ones, what this rank holds. Computed on the CPU, so that devices agree."""
    for name, weight in weights.items():
        local = local_tensor(weight)
        std = weight_std(name, config)
        if std is None:
            local.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            values = normal(random_key(seed, "init", name=name), local_global_index(weight))
            local.copy_((values * std).to(local.dtype))
