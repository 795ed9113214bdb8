"""Which linears are multiplied by the device's matrix units: those that have them, that take their products, and that are measured to gain by it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from regrowth.errors import UserError
from regrowth.kernels import hardware
from regrowth.kernels.linear import LowPrecisionLinear
from regrowth.kernels.recipe import LinearPrecision, PrecisionRecipe

Shape = tuple[int, int, LinearPrecision]


def choose_products(
    modules: Sequence[nn.Module],
    recipe: PrecisionRecipe,
    products: str,
    layers: int,
    tokens: int,
    device: torch.device,
    chosen: list[str] | None = None,
) -> dict[str, float]:
    """Give linears to the matrix units (`module.hardware`); collective.

    Args:
        products: "emulated"; "hardware": all that they take; "auto": all that gain.
        tokens: of a micro-batch on a rank.
        chosen: those that were found to be slower when the run began; nothing is measured again, for a run that goes on is to compute as it did.

    Returns:
        Of linears that stay wide because low precision would be slower, by name, how many times as fast it would be.

    Raises:
        UserError: "hardware" on a device that has no such products.
    """
    missing = hardware.lacks(device)
    if products == "hardware" and missing:
        raise UserError(f'precision.products = "hardware": {missing}. Set precision.products = "auto" or "emulated".')
    if products == "emulated" or missing or recipe.is_full:
        return {}
    linears = {name: m for module in modules for name, m in module.named_modules() if isinstance(m, LowPrecisionLinear)}
    shapes: dict[str, Shape] = {name: (*linear.weight.shape, recipe.of(name, linear.kind, layers)) for name, linear in linears.items()}  # pyright: ignore[reportAssignmentType]
    shapes = {name: (out, into, its) for name, (out, into, its) in shapes.items() if hardware.takes_linear(its, out, into, tokens)}
    if chosen is not None:
        for name, linear in linears.items():
            linear.hardware = name in shapes and name not in chosen
        return {}
    gains = {shape: 2.0 if products == "hardware" else hardware.gain(tokens, *shape, device) for shape in dict.fromkeys(shapes.values())}
    agreed = _least_of_all({name: gains[shape] for name, shape in shapes.items()})
    for name, linear in linears.items():
        linear.hardware = name in shapes and agreed[name] > 1.0
    return {name: agreed[name] for name in agreed if agreed[name] <= 1.0}


def _least_of_all(gains: dict[str, float]) -> dict[str, float]:
    """What the slowest rank measured: all of them choose alike."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return gains
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, gains)
    return {name: min(part[name] for part in parts if name in part) for part in parts for name in part}
