"""From a mixing config to its policy over a corpus's domains, and to the mixer that draws by it."""

import numpy as np

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.mixing.ado import AdaptiveDataOptimization
from regrowth.data_pipeline.mixing.bandits import DoReMi, Exp3, OnlineDataMixing
from regrowth.data_pipeline.mixing.config import (
    AdoMixing,
    DoReMiMixing,
    Exp3Mixing,
    LearningMixing,
    Mixing,
    OdmMixing,
    ScheduleMixing,
    StaticMixing,
    UniMaxMixing,
)
from regrowth.data_pipeline.mixing.limits import Limits, SaturationMonitor
from regrowth.data_pipeline.mixing.mixer import Mixer
from regrowth.data_pipeline.mixing.policy import Policy, Static, resolve_weights, schedule_of, unimax
from regrowth.data_pipeline.mixing.rewards import Reward, reference_losses
from regrowth.errors import UserError


def build_mixer(config: Mixing, loader: LoaderConfig, domains: list[str], tokens: list[int], budget_tokens: int = 0) -> Mixer:
    """The mixer of a run: its policy, its bounds and its draws per step. Arguments and errors as of `build_policy`."""
    policy = build_policy(config, domains, tokens, budget_tokens)
    monitor = SaturationMonitor(config.saturation, len(domains)) if config.saturation else None
    units = loader.global_batch // loader.unit_sequences
    return Mixer(policy, domains, units, loader.update_delay, loader.seed, Limits.of(config, domains), monitor)


def build_policy(config: Mixing, domains: list[str], tokens: list[int], budget_tokens: int = 0) -> Policy:
    """The policy of a config over these domains, with their training tokens (for natural shares) and the tokens the run will read (for UniMax).

    Raises:
        UserError: weights name a domain that the corpus does not have, or leave one out; a reference does not cover the domains.
    """
    if isinstance(config, StaticMixing):
        return Static(resolve_weights(config.weights, domains, tokens, "mixing.weights", config.temperature))
    if isinstance(config, ScheduleMixing):
        return schedule_of(config.stages, config.interpolate, domains, tokens)
    if isinstance(config, UniMaxMixing):
        if not (budget := config.budget_tokens or budget_tokens):
            raise UserError(
                "mixing.budget_tokens: UniMax has to know how many tokens will be read, and this is not a run that says so; set it."
            )
        return Static(unimax(np.array(tokens, dtype=np.float64), budget, config.epochs))
    assert isinstance(config, LearningMixing)
    initial = resolve_weights(config.initial, domains, tokens, "mixing.initial")
    if isinstance(config, AdoMixing):
        return AdaptiveDataOptimization(initial, config)
    reward = Reward(config.reward, reference_losses(config.reference, domains), len(domains))
    if isinstance(config, OdmMixing):
        return OnlineDataMixing(initial, config.form, config.alpha, config.warmup_steps, config.initial_reward, reward)
    if isinstance(config, Exp3Mixing):
        return Exp3(initial, config.gamma, config.reward_range, config.warmup_steps, reward)
    assert isinstance(config, DoReMiMixing)
    return DoReMi(initial, config.step_size, config.smoothing, config.warmup_steps, reward)
