"""Learning rates: warm-up, then WSD or cosine; and a new warm-up after each growth."""

import math

from regrowth.pretrain.config import ScheduleConfig


def base_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate at `step` (0-based) of `steps`, growth left out.

    wsd: linear warm-up, constant, then linear to `final_fraction` over the last `decay_fraction`.
    cosine: linear warm-up, then half a cosine to `final_fraction` at the end.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = round(config.decay_fraction * steps)
    left = steps - step
    return 1.0 if left > decay_steps else config.final_fraction + (1 - config.final_fraction) * left / decay_steps


def lr_factor(config: ScheduleConfig, step: int, steps: int, growths: list[int]) -> float:
    """`base_factor`, times a linear re-warming over `rewarm_steps` after the last growth (growths: the steps they came before)."""
    factor = base_factor(config, step, steps)
    since = [step - at for at in growths if at <= step]
    if since and config.rewarm_steps:
        factor *= min(1.0, (min(since) + 1) / config.rewarm_steps)
    return factor
