"""Growing a checkpoint into a checkpoint. Growth inside a run is the same path: checkpoint -> grow -> rebuild.

The whole state is held in memory once as source and once as target, on one process.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from regrowth.errors import UserError
from regrowth.pretrain.checkpoint import CheckpointState, canonical_shapes, has_moments, load_plain, save_checkpoint, verify
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator, Moments
from regrowth.pretrain.growth.plan import GrowthPlan
from regrowth.pretrain.model_config import ModelConfig


def grow_checkpoint(source: Path, target: Path, plan: GrowthPlan) -> CheckpointState:
    """Grow the checkpoint at `source` into a new one at `target`; returns the new state.

    Raises:
        UserError: `source` is refused, `target` exists, or an operator does not fit.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; growing never overwrites. Remove it or choose another output.")
    state, weights, moments = load_plain(source)
    identity = verify(source)["id"]
    config, *_ = shapes = plan.configs(state.model)
    for operator in plan.operators:
        config, weights, moments = grow_state(operator, config, weights, moments, plan.moments, plan.seed)
    sizes = {
        "layers": [shapes[0].layers, config.layers],
        "width": [shapes[0].width, config.width],
        "parameters": [shapes[0].parameters, config.parameters],
    }
    lineage = state.lineage.grown(identity, {**plan.describe(), **sizes})
    trainer = {**state.trainer, "guard": {}}  # losses of the smaller model are no measure for the larger one
    grown = CheckpointState(config, lineage, state.loader, trainer)
    save_checkpoint(target, weights, moments, grown, alone=True)
    return grown


def grow_tensor(
    operator: GrowthOperator,
    name: str,
    shape: torch.Size,
    config: ModelConfig,
    grown: ModelConfig,
    read: Callable[[str], torch.Tensor],
    seed: int = 0,
) -> torch.Tensor:
    """A target weight, or with `.exp_avg` or `.exp_avg_sq` behind its name a moment.

    Args:
        shape: the target's.
        read: gives a source tensor by its name, with the same ending.
    """
    base, ending = _split(name)
    terms = operator.terms(TensorName.parse(base), config, grown)

    def source(of: TensorName) -> torch.Tensor:
        return read(f"{of}{ending}")

    parts = [term.moments(source, ending == ".exp_avg_sq") if ending else term.weights(source, seed) for term in terms]
    return _combine(shape, torch.float32, parts, name)


def grow_state(
    operator: GrowthOperator,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    carry: Moments = "carry",
    seed: int = 0,
) -> tuple[ModelConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The target's config, weights and moments.

    Args:
        config: the source model's.
        weights: canonical name -> tensor.
        moments: `{canonical name}.exp_avg` and `.exp_avg_sq` -> tensor.
        carry: whether moments follow their weights by the operator's rule, or begin at zero.
    """
    grown = operator.grow_config(config)
    new_weights, new_moments = {}, {}
    for name, shape in canonical_shapes(grown).items():
        new_weights[name] = grow_tensor(operator, name, shape, config, grown, weights.__getitem__, seed)
        for moment in (f"{name}.exp_avg", f"{name}.exp_avg_sq") if has_moments(name) else ():
            zero = carry == "zero"
            new_moments[moment] = (
                torch.zeros(shape) if zero else grow_tensor(operator, moment, shape, config, grown, moments.__getitem__, seed)
            )
    return grown, new_weights, new_moments


def _split(name: str) -> tuple[str, str]:
    for ending in (".exp_avg_sq", ".exp_avg"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _combine(shape: torch.Size, dtype: torch.dtype, parts: list[torch.Tensor | None], name: str) -> torch.Tensor:
    """The sum of the parts, zeros if there are none."""
    total = torch.zeros(shape, dtype=dtype)
    for part in parts:
        if part is not None:
            assert part.shape == shape, f"{name}: {tuple(part.shape)} is not {tuple(shape)}"
            total += part
    return total
