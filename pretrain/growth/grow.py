"""Growing a checkpoint into a checkpoint. Growth inside a run is the same path: checkpoint -> grow -> rebuild.

The whole state is held in memory once as source and once as target, on one process.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrowth.errors import UserError, nearest
from regrowth.pretrain.checkpoint import CheckpointState, load_plain, save_checkpoint, verify
from regrowth.pretrain.growth.operator import GrowthOperator, grow_state
from regrowth.pretrain.growth.stack import Stack

OPERATORS: dict[str, Callable[..., GrowthOperator]] = {"stack": Stack}


def build_operator(op: str, **options: Any) -> GrowthOperator:
    """An operator by name.

    Raises:
        UserError: there is no such operator, or it has no such option.
    """
    if op not in OPERATORS:
        raise UserError(f'growth op "{op}": no such operator; {nearest(op, OPERATORS)}')
    try:
        return OPERATORS[op](**options)
    except TypeError as error:
        raise UserError(f'growth op "{op}": {error}') from error


def grow_checkpoint(source: Path, target: Path, operator: GrowthOperator) -> CheckpointState:
    """Grow the checkpoint at `source` into a new one at `target`; returns the new state.

    Raises:
        UserError: `source` is refused, or `target` exists.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; growing never overwrites. Remove it or choose another output.")
    state, weights, moments = load_plain(source)
    identity = verify(source)["id"]
    config, weights, moments = grow_state(operator, state.model, weights, moments)
    lineage = state.lineage.grown(identity, {**operator.describe(), "from_layers": state.model.layers, "to_layers": config.layers})
    trainer = {**state.trainer, "guard": {}}  # losses of the smaller model are no measure for the larger one
    grown = CheckpointState(config, lineage, state.loader, trainer)
    save_checkpoint(target, weights, moments, grown, alone=True)
    return grown
