"""AdamW with decoupled decay: matrices decay, norm gains and the embedding do not."""

import torch
from torch import nn

from regrowth.pretrain.config import OptimizerConfig


def build_optimizer(parameters: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over two groups (Loshchilov and Hutter 2019)."""
    trained = {name: p for name, p in parameters if p.requires_grad}
    decayed = {name: p for name, p in trained.items() if p.dim() >= 2 and name != "embed.weight"}
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
