"""Precision recipes as TOML: the published ones that ship with the package (`configs/precision/`), a file of one's own, or a table in a run's config.

A file gives its quantisers names and says where each is used; `linears` stands for attention projections and FFN alike. Names of formats stand for a quantiser of that format with a
scale per row:

    [quantizers]
    weight = { format = "e2m1", granularity = "tile", block = 16, scale = "two_level" }
    [linears]
    forward = { a = "e4m3", b = "weight" }
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from regrowth.errors import UserError
from regrowth.kernels.recipe import FULL, GemmPrecision, PrecisionRecipe
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.model_config import ModelConfig
from regrowth.settings import nearest, read_toml, recipe_folder, validate

_FORMATS = ("e2m1", "e4m3", "e5m2")


def expand(values: Any) -> Any:
    """The plain table of a recipe with its names replaced by what they stand for.

    Raises:
        ValueError: an operand names a quantiser that is not there, `linears` beside `attention` or `ffn`.
    """
    if not isinstance(values, dict):
        return values
    values = dict(values)
    named, linears = values.pop("quantizers", {}), values.pop("linears", None)
    if linears is not None:
        if "attention" in values or "ffn" in values:
            raise ValueError("linears stands for attention and ffn; give the one or the others")
        values |= {"attention": linears, "ffn": linears}
    for kind in ("attention", "ffn"):
        if isinstance(values.get(kind), dict):
            values[kind] = {key: _with_quantizers(gemm, named) for key, gemm in values[kind].items()}
    return values


def _with_quantizers(gemm: Any, named: dict[str, Any]) -> Any:
    if not isinstance(gemm, dict):
        return gemm
    return {key: _quantizer(operand, named) if key in ("a", "b") and isinstance(operand, str) else operand for key, operand in gemm.items()}


def _quantizer(name: str, named: dict[str, Any]) -> Any:
    if name in named:
        return named[name]
    if name in _FORMATS:
        return {"format": name}
    raise ValueError(f'"{name}" is neither in the table quantizers nor a format; {nearest(name, [*named, *_FORMATS])}')


Recipe = Annotated[PrecisionRecipe, BeforeValidator(expand)]


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in (recipe_folder() / "precision").glob("*.toml"))


def load_recipe(name: str) -> PrecisionRecipe:
    """A recipe by name, or from a file by path (`.toml`); "full" rounds nothing.

    Raises:
        UserError: no such recipe, or a fault in the file, by key.
    """
    if name == FULL.name:
        return FULL
    if not name.endswith(".toml"):
        return _shipped(name)
    if not Path(name).exists():
        raise UserError(
            f"{name}: there is no such file. Give a path to a TOML file or the name of a recipe ({', '.join([FULL.name, *shipped()])})."
        )
    return _read(Path(name))


@cache
def _shipped(name: str) -> PrecisionRecipe:
    path = recipe_folder() / "precision" / f"{name}.toml"
    if not path.exists():
        raise UserError(f'precision.recipe = "{name}": no such recipe; {nearest(name, [FULL.name, *shipped()])}')
    return _read(path)


def _read(path: Path) -> PrecisionRecipe:
    try:
        return validate(PrecisionRecipe, expand(read_toml(path)), str(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def linear_names(model: ModelConfig) -> list[str]:
    """The names of all linears that recipes speak of."""
    names = []
    for layer in range(model.layers):
        names += [f"layers.{layer}.attn.{w}" for w in ("wq", "wk", "wv", "wo")]
        matrices = ("w_gate", "w_up", "w_down")
        if model.is_moe(layer) and model.moe:
            names += [f"layers.{layer}.ffn.experts", *(f"layers.{layer}.ffn.shared.{w}" for w in matrices if model.moe.shared_width)]
        else:
            names += [f"layers.{layer}.ffn.{w}" for w in matrices]
    return names


def matrices_of(linear: str) -> list[str]:
    """What is rounded on its own: stacked experts matrix by matrix."""
    return [f"{linear}.{matrix}" for matrix in ("w_gate", "w_up", "w_down")] if linear.endswith(".experts") else [linear]


def check_fits(recipe: PrecisionRecipe, model: ModelConfig, plan: ParallelPlan, lengths: Iterable[int]) -> None:
    """Whether a recipe fits a model under a plan: its patterns name linears, and its blocks and transforms divide what they run along.

    Args:
        lengths: of the run's sequences.

    Raises:
        ValueError: what does not fit, and what would.
    """
    names = linear_names(model)
    for pattern in recipe.wide:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f'precision.wide: "{pattern}" names no linear of the model; {nearest(pattern, names)} (`*` stands for anything: "*.attn.wo")'
            )
    # The second matrix of a pair is cut along what it contracts, the first along what its input gradient contracts.
    attention = {
        "model.width": model.width,
        "model.heads x head_dim / parallel.tp": model.heads * model.head_dim // plan.tp,
        "model.kv_heads x head_dim / parallel.tp": model.kv_heads * model.head_dim // plan.tp,
    }
    ffn = {"model.width": model.width, **{f"{key} / parallel.tp": size // plan.tp for key, size in model.hidden_widths.items()}}
    # A rank of cp holds two chunks of a sequence, and no block of tokens may straddle them.
    chunks = 2 * plan.cp if plan.cp > 1 else 1
    tokens = [("loader.sequence_length / chunks", length // chunks) for length in lengths]
    in_tiles = any(tile == "a" for gemm in (recipe.ffn.forward, recipe.ffn.dgrad) for _, _, tile in _divisors(gemm))
    if model.expert_count and (in_tiles or list(_divisors(recipe.ffn.wgrad))):
        raise ValueError("precision.recipe: blocks along the tokens do not fit experts, which get as many tokens as choose them; take a recipe with "
                         "scales per row for the FFN's weight gradients")  # fmt: skip
    for linear, dims in ((recipe.attention, attention), (recipe.ffn, ffn)):
        for gemm in (linear.forward, linear.dgrad, linear.wgrad):
            for what, size, tile in _divisors(gemm):
                along_tokens = gemm is linear.wgrad or tile == "a"
                sizes = [*(tokens if along_tokens else []), *(dims.items() if tile or gemm is not linear.wgrad else [])]
                for name, of in sizes:
                    if of % size:
                        raise ValueError(f"{name} = {of} is not a multiple of the precision recipe's {what} of {size}; "
                                         "choose another size, or a recipe with scales per row")  # fmt: skip


def _divisors(gemm: GemmPrecision) -> Iterator[tuple[str, int, str]]:
    """What has to divide dims of a GEMM's operands: what it is, its size, and the operand of which it divides both dims, if it does."""
    for side, quantizer in (("a", gemm.a), ("b", gemm.b)):
        if quantizer.format and quantizer.granularity in ("block", "tile"):
            yield "blocks", quantizer.block, side if quantizer.granularity == "tile" else ""
    if gemm.hadamard and not gemm.is_high:
        yield "Hadamard transforms", gemm.hadamard, ""
