"""Averages of checkpoints of one model: uniform over the latest (LAWA, arXiv 2209.14981) or exponential in their order."""

from pathlib import Path
from typing import Literal

from regrowth.errors import UserError
from regrowth.pretrain.checkpoint import CheckpointState, identity_of, load_plain, save_checkpoint
from regrowth.pretrain.lineage import Parent

Kind = Literal["uniform", "ema"]


def shares(kind: Kind, count: int, decay: float = 0.9) -> list[float]:
    """The weight of each of `count` checkpoints, oldest first; they sum to 1.

    uniform: 1 / count each. ema: what an exponential moving average over them gives, decay^(count - 1) for the first and (1 - decay) decay^(count - 1 - i) for
    the others.
    """
    if kind == "uniform":
        return [1.0 / count] * count
    return [decay ** (count - 1), *((1.0 - decay) * decay ** (count - 1 - i) for i in range(1, count))]


def average_checkpoints(sources: list[Path], target: Path, kind: Kind = "uniform", decay: float = 0.9) -> CheckpointState:
    """Write the average of checkpoints, oldest first. Moments, data and step are the newest one's. Two models are held in memory.

    Raises:
        UserError: fewer than two, one is refused or of another shape, or `target` exists.
    """
    if len(sources) < 2:
        raise UserError(f"averaging: {len(sources)} checkpoint given; name two or more, or a run with --last 2 or more.")
    if target.exists():
        raise UserError(f"{target}: exists already; averaging never overwrites. Remove it or choose another output.")
    *_, newest = sources
    state, total, moments = load_plain(newest)
    weights = shares(kind, len(sources), decay)
    total = {name: tensor.double() * weights[-1] for name, tensor in total.items()}
    parents = []
    for path, weight in zip(sources[:-1], weights[:-1], strict=True):
        other, tensors, _ = load_plain(path)
        if other.model != state.model:
            raise UserError(
                f"{path}: its model has another shape or config than {newest}'s; only checkpoints of one model can be averaged."
            )
        for name, tensor in tensors.items():
            total[name] += tensor.double() * weight
        parents.append(_parent(path, other, kind, weight))
    lineage = state.lineage.model_copy(update={"parents": [*state.lineage.parents, *parents, _parent(newest, state, kind, weights[-1])]})
    made = CheckpointState(state.model, lineage, state.loader, {**state.trainer, "guard": {}})
    save_checkpoint(target, {name: tensor.float() for name, tensor in total.items()}, moments, made, alone=True)
    return made


def _parent(path: Path, state: CheckpointState, kind: Kind, weight: float) -> Parent:
    operator = {"op": f"{kind} average", "operators": [{"op": "average", "weight": round(weight, 6)}]}
    return state.lineage.as_parent(identity_of(path), "averaged from", operator)
