"""Configs: TOML in, strict pydantic models out, and an error that names file, key, value and remedy.

One base class for the models of every room. Unknown keys are errors (a typo must not train for a week with a default), values are
checked at load, and `section.key=value` overrides go through the same checks as the file.
"""

import tomllib
import types
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from regrowth.errors import UserError, nearest

Model = TypeVar("Model")


class Settings(BaseModel):
    """Base of all config models: unknown keys are refused, values are immutable once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        UserError: the file is missing, is a folder, is not UTF-8 or not TOML (with the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: there is no such config. Give a path to a TOML file or the name of a recipe ({', '.join(recipes())})."
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; give the TOML file in it.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); TOML files are UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from error


def recipe_folder() -> Path:
    """Where the recipes that ship with the package are."""
    return Path(__file__).parent / "configs"


def recipes() -> list[str]:
    """The names of the training recipes that ship with the package."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def find_recipe(name: str) -> Path:
    """A config by path, or by the name of a shipped recipe."""
    path = Path(name)
    if path.exists() or (path.suffix == ".toml" and len(path.parts) > 1):
        return path
    for folder in (recipe_folder(), recipe_folder() / "data"):
        if (shipped := folder / f"{path.stem}.toml").exists():
            return shipped
    raise UserError(f"{name}: neither a file nor a recipe; {nearest(path.stem, recipes())}")


def _check_plain_name(value: str) -> str:
    if not value or "/" in value or "\0" in value or value.startswith("."):
        raise ValueError("this names a file or folder: not empty, no slash, no dot in front")
    return value


PlainName = Annotated[str, AfterValidator(_check_plain_name)]


class _Whole(dict[str, Any]):
    """A table given in one piece (`mixing={policy="static"}`): it replaces what was there, where dotted keys change single values."""


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`["optimizer.lr=3e-4", "run.name=x"]` as a nested dict; values are TOML, and what is not TOML is taken as a string.

    Raises:
        UserError: an override without "=", or one that sets a key inside a plain value.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f'override "{override}": write it as section.key=value, for example optimizer.lr=3e-4.')
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *sections, leaf = key.strip().split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f'override "{override}": {section} was already set to a plain value.')
        node[leaf] = _Whole(value) if isinstance(value, dict) else value
    return tree


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section; lists of tables are addressed by index (`growth.0.factor=3`)."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, _Whole):
            merged[key] = dict(value)
        elif isinstance(value, dict) and isinstance(below, list):
            merged[key] = _merge_list(key, below, value)
        elif isinstance(value, dict) and isinstance(below, dict):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _merge_list(key: str, below: list[Any], changes: dict[str, Any]) -> list[Any]:
    merged = list(below)
    for index, change in changes.items():
        if not index.isdecimal() or int(index) >= len(below):
            have = f"0 to {len(below) - 1}" if below else "none, the list is empty"
            raise UserError(
                f"override {key}.{index}: {key} is a list, and its entries are addressed by number ({have}); or give it whole, {key}=[...]."
            )
        entry = below[int(index)]
        merged[int(index)] = merge(entry, change) if isinstance(change, dict) and isinstance(entry, dict) else change
    return merged


def load(model: type[Model], path: Path, overrides: list[str] | None = None) -> Model:
    """Read a TOML file, lay overrides over it, validate.

    Raises:
        UserError: naming file, key, value and what is allowed; all faults at once, one line each.
    """
    values = merge(read_toml(path), parse_overrides(overrides or []))
    return validate(model, values, str(path))


def validate(model: type[Model], values: Any, origin: str) -> Model:
    """Validate plain data against a config model or a dataclass; faults become one UserError that names `origin` and each key."""
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        lines = [_letter(model, values, fault, origin) for fault in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from error


def _letter(model: type, values: Any, fault: ErrorDetails, origin: str) -> str:
    where = _config_key(values, fault["loc"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(model, values, fault["loc"][:-1])
        return f'{origin}: unknown key "{where}"; {nearest(str(fault["loc"][-1]), known)}'
    if fault["type"] == "missing":
        return f'{origin}: the key "{where}" is missing; it has no default.'
    message = fault["msg"].removeprefix("Value error, ")
    if not where or (isinstance(fault["input"], dict) and fault["type"] == "value_error"):
        return f"{origin}: {message}"  # a check over several keys, which names them itself
    if fault["type"] == "union_tag_invalid":
        context = fault.get("ctx", {})
        key = str(context.get("discriminator", "kind")).strip("'")
        tags = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
        return f'{origin}: {where}.{key} = "{context.get("tag")}": no such {key}; {nearest(str(context.get("tag")), tags)}'
    shown = repr(fault["input"])
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    return f"{origin}: {where} = {shown}: {message[:1].lower() + message[1:]}"


def _config_key(values: Any, loc: tuple[int | str, ...]) -> str:
    """The key as the user wrote it: pydantic's location without the tags of unions."""
    parts, node = [], values
    for part in loc:
        if isinstance(node, dict) and part not in node and part != loc[-1]:
            continue  # the tag of a union, not a key
        parts.append(str(part))
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return ".".join(parts)


def _known_keys(model: type, values: Any, loc: tuple[int | str, ...]) -> set[str]:
    """The keys allowed at `loc`: of the model there, or of all models a union allows there."""
    here: list[type] = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        below = [inner for m in here if part in _fields(m) for inner in _models_in(_fields(m)[part])]
        tagged = [m for m in here if any(part in get_args(annotation) for annotation in _fields(m).values())]
        here = below or tagged or here
    return {name for m in here for name in _fields(m)}


def _fields(model: type) -> dict[str, Any]:
    """Names and annotations of a config model's keys, or of a dataclass's."""
    if issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return get_type_hints(model)


def _models_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list, dict, tuple, Annotated):
        return [found for inner in get_args(annotation) for found in _models_in(inner)]
    return []


def differences(before: dict[str, Any], after: dict[str, Any], below: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value after) of what differs between two configs as plain values; None stands for what is not there."""
    found = []
    for key in dict.fromkeys([*before, *after]):
        ours, theirs = before.get(key), after.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, f"{below}{key}.")
        elif ours != theirs:
            found.append((f"{below}{key}", ours, theirs))
    return found


def to_toml(config: BaseModel) -> str:
    """A config as TOML text that loads back to an equal config; keys that are None are left out (TOML has no null)."""
    import tomli_w

    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
