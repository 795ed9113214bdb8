"""What low precision has learned of a linear, for those that come from it."""

from typing import Any

from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.plan import GrowthPlan
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.precision import linear_names, matrices_of


def grown_precision(state: dict[str, Any], plan: GrowthPlan, config: ModelConfig) -> dict[str, Any]:
    """The `precision` of a grown checkpoint's trainer.json: what comes from a linear that went wide is wide, too, and has its delayed scales if the plan carries them.

    Which linears are slower in low precision is measured again, for their sizes are others.

    Args:
        state: of the source, as `PrecisionState.state_dict` gives it.
        config: the source model's.
    """
    shapes = plan.configs(config)
    fallen, scales = state.get("wide", []), state.get("scales", {}) if plan.scales == "carry" else {}
    carried: dict[str, Any] = {"wide": [], "scales": {}}
    for linear in linear_names(shapes[-1]):
        origins = {matrix: _origin(matrix, plan, shapes) for matrix in matrices_of(linear)}
        if any(origin in fallen or (origin or "").rpartition(".")[0] in fallen for origin in origins.values()):
            carried["wide"].append(linear)
        carried["scales"] |= {matrix: scales[origin] for matrix, origin in origins.items() if origin in scales}
    found = {key: value for key, value in carried.items() if value}
    return {**found, "recipe": state["recipe"]} if found else {}


def _origin(matrix: str, plan: GrowthPlan, shapes: list[ModelConfig]) -> str | None:
    """The source model's matrix that the first part of a grown one comes from, if it comes from any."""
    name = TensorName.parse(matrix if ".experts." in matrix else f"{matrix}.weight")
    for operator, before, after in reversed(list(zip(plan.operators, shapes, shapes[1:], strict=False))):
        sources = [term.source for term in operator.terms(name, before, after) if isinstance(term.source, TensorName)]
        if not sources:
            return None
        name = sources[0]
    return str(name).removesuffix(".weight")
