"""From a config to a model, and to the engine that trains it."""

from functools import partial
from typing import Protocol

import torch

from regrowth.parallel.deepspeed_engine import DeepSpeedEngine
from regrowth.parallel.engine import Engine
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.native_engine import NativeEngine
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.attention import choose_attention
from regrowth.pretrain.config import OptimizerConfig, RunSettings
from regrowth.pretrain.initialise import initialise
from regrowth.pretrain.model import Transformer
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.optim import build_optimizer


class BatchShape(Protocol):
    """What an engine must know of batches."""

    @property
    def sequence_length(self) -> int: ...
    @property
    def global_batch(self) -> int: ...


class Recipe(Protocol):
    """The parts of a run's config that make an engine."""

    @property
    def run(self) -> RunSettings: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def parallel(self) -> ParallelPlan: ...
    @property
    def loader(self) -> BatchShape: ...


def build_model(config: ModelConfig, device: torch.device, attention: str = "auto") -> Transformer:
    """A whole model on the meta device."""
    with torch.device("meta"):
        return Transformer(config, choose_attention(attention, device))


def build_engine(recipe: Recipe, model: ModelConfig, mesh: Mesh) -> Engine:
    """The engine that the plan names, its weights initialised.

    Args:
        model: the model's shape now, which growth may have made another than the config's.
    """
    plan, loader = mesh.plan, recipe.loader
    core = choose_attention(recipe.run.attention, mesh.device)

    def build(layers: range | None, first: bool, last: bool) -> Transformer:
        with torch.device("meta"):
            stage = Transformer(model, core, layers, first, last)
        stage.recompute, stage.recompute_every = plan.recompute, plan.recompute_every
        stage.z_loss = recipe.optimizer.z_loss
        return stage

    fill = partial(initialise, config=model, seed=recipe.run.seed)
    optimizer = partial(build_optimizer, config=recipe.optimizer)
    autocast = torch.bfloat16 if recipe.run.dtype == "bfloat16" else None
    if plan.engine == "deepspeed":
        return DeepSpeedEngine(build(None, True, True), mesh, fill, optimizer, autocast)
    return NativeEngine(
        build,
        model,
        mesh,
        core,
        fill=fill,
        optimizer=optimizer,
        sequence_length=loader.sequence_length,
        micro_batches=-(-loader.global_batch // (plan.data_ranks * plan.micro_batch)),
        autocast=autocast,
    )
