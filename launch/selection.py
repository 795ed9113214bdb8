"""The `data select` commands: fit selectors, tell of them, train a family, compare."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.select.loss_store import Tell
from regrowth.data_pipeline.select.pool import Pool
from regrowth.data_pipeline.select.record import read_record
from regrowth.errors import UserError, nearest
from regrowth.launch.data import prepare_with_progress, show_plan
from regrowth.launch.selection_config import SelectionRecipe
from regrowth.settings import find_recipe, load

_FAMILY = "family/"  # in front of a model's path: one of the family's


def load_recipe(recipe: str, overrides: list[str]) -> SelectionRecipe:
    """A selection's recipe."""
    return load(SelectionRecipe, find_recipe(recipe), overrides)


def open_pools(recipe: SelectionRecipe, console: Console) -> tuple[Pool, Pool | None]:
    """The pool and the target, prepared if they are not yet. The target has the pool's tokenizer."""
    pool = Pool(prepare_with_progress(recipe.data, console).folder)
    if recipe.target is None:
        return pool, None
    target = Pool(prepare_with_progress(with_tokenizer(recipe.target, pool), console).folder)
    _refuse_leaks(pool, target, recipe)
    return pool, target


def _refuse_leaks(pool: Pool, target: Pool, recipe: SelectionRecipe) -> None:
    """What the judge measures on must not be trained on.

    Raises:
        UserError: some of the pool's training documents are held-out text of the target.
    """
    held = {key for batch in target.heldout() for key in batch.column("content_hash").to_pylist()}
    both = sum(key in held for batch in pool.batches() for key in batch.column("content_hash").to_pylist())
    if both:
        assert recipe.target is not None
        raise UserError(f"data: {both:,} training documents of the pool are held-out text of the target. Documents are held out by their content: set data.heldout_fraction to "
                        f"target.heldout_fraction ({recipe.target.heldout_fraction}) or more, or take the target's documents out of the pool.")  # fmt: skip


def with_tokenizer(config: DataConfig, pool: Pool) -> DataConfig:
    """A corpus's config with the pool's tokenizer."""
    return config.model_copy(
        update={"tokenizer": config.tokenizer.model_copy(update={"path": (pool.root / "tokenizer" / "tokenizer.json").resolve()})}
    )


def chosen_selectors(recipe: SelectionRecipe, only: str) -> dict[str, Any]:
    """Those named, or all; family models in the place of their names. Those that need another come behind it.

    Raises:
        UserError: there is none, or no such one.
    """
    names = [name.strip() for name in only.split(",") if name.strip()] or list(recipe.selectors)
    for name in names:
        if name not in recipe.selectors:
            raise UserError(f"--only {name}: the recipe has no such selector; {nearest(name, recipe.selectors)}")
    if not names:
        raise UserError("selectors: the recipe has none. A section [selectors.NAME] with a kind makes one.")
    found = {name: _resolved(recipe, recipe.selectors[name]) for name in names}
    return dict(sorted(found.items(), key=lambda pair: pair[1].kind == "length_matched"))


def _resolved(recipe: SelectionRecipe, config: Any) -> Any:
    changes: dict[str, Any] = {}
    # What is written down about a selector holds from any working folder.
    for key in config.models:
        path = recipe.out / getattr(config, key) if str(getattr(config, key)).startswith(_FAMILY) else Path(getattr(config, key))
        if path.is_dir() or str(getattr(config, key)).startswith(_FAMILY):  # else a name on the Hub
            changes[key] = str(path.resolve())
    if hasattr(config, "losses"):
        changes["losses"] = config.losses.model_copy(update={"cache": config.losses.cache.resolve()})
    if config.kind == "preselect" and str(config.models_file) == "family":
        changes["models_file"] = recipe.family_models().resolve()
    if config.kind == "length_matched" and str(config.like) in recipe.selectors:
        changes["like"] = (recipe.out / "selectors" / str(config.like)).resolve()
    return config.model_copy(update=changes)


def needs_family(config: Any, recipe: SelectionRecipe) -> bool:
    """Whether a selector is made of the family's models."""
    paths = [str(getattr(config, key)) for key in config.models]
    return (config.kind == "preselect" and str(config.models_file) in ("family", str(recipe.family_models()))) or any(
        path.startswith((_FAMILY, str((recipe.out / "family").resolve()))) for path in paths
    )


def fit(recipe: str, overrides: list[str], only: str, dry_run: bool) -> None:
    """The `fit` command."""
    settings, console = load_recipe(recipe, overrides), Console()
    chosen = chosen_selectors(settings, only)
    if dry_run:
        show_plan(settings.data, console)
        for name, config in chosen.items():
            state = "fitted" if (settings.out / "selectors" / name / "selector.json").exists() else "to be fitted"
            console.print(f"{settings.out / 'selectors' / name}: {config.kind}, {state}", soft_wrap=True)
        return
    pool, target = open_pools(settings, console)
    fit_all(settings, chosen, pool, target, console)
    for name in chosen:
        _tell(settings.out / "selectors" / name, console)


def fit_all(recipe: SelectionRecipe, chosen: dict[str, Any], pool: Pool, target: Pool | None, console: Console) -> None:
    """Fit what is not fitted yet.

    Raises:
        UserError: a selector cannot be fitted; those before it are.
    """
    from regrowth.data_pipeline.select.selector import fit_selector

    for name, config in chosen.items():
        if needs_family(recipe.selectors[name], recipe) and not recipe.family_models().exists():
            raise UserError(
                f"selectors.{name}: is made of the family's models, which are not trained yet: regrowth data select train-family RECIPE"
            )
        with _progress(name, console) as tell:
            selector = fit_selector(config, recipe.out / "selectors" / name, pool, target, tell)
        selector.close()


@contextmanager
def _progress(name: str, console: Console) -> Iterator[Tell]:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TimeElapsedColumn())
    console.print(f"fitting {escape(name)} ...")
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: float, total: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(escape(what), total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell


def describe(folder: Path, as_json: bool) -> None:
    """The `describe` command."""
    record = read_record(folder)
    if as_json:
        return print(json.dumps(record, indent=1, ensure_ascii=False))
    _tell(folder, Console())


def _tell(folder: Path, console: Console) -> None:
    record = read_record(folder)
    cost = record["cost"]
    table = Table("", "", show_header=False, title=f"{folder}: {record['config']['kind']}", title_justify="left")
    table.add_row("cost of fitting", f"{cost['seconds']:.1f} s, {cost['flops']:.2e} FLOPs")
    for key, value in record["findings"].items():
        table.add_row(key.replace("_", " "), escape(_spell(value)))
    console.print(table)


def _spell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_spell(inner)}" for key, inner in value.items())
    return ", ".join(map(_spell, value)) if isinstance(value, list) else str(value)


def train_family(recipe: str, overrides: list[str], at_once: int) -> None:
    """The `train-family` command."""
    from regrowth.launch import family

    settings, console = load_recipe(recipe, overrides), Console()
    pool, target = open_pools(settings, console)
    console.print(f"models: {family.train_family(settings, pool, target, at_once, console)}", soft_wrap=True)


def strength(corpus: Path, groups: int, per: str) -> None:
    """The `strength` command: the groups of a corpus by the mean of the strength that its recipe gave its documents."""
    import numpy as np

    from regrowth.data_pipeline.phases.keep_best import groups_of
    from regrowth.data_pipeline.select.strength import STRENGTH, group_means
    from regrowth.data_pipeline.transforms.base import score_of

    if per not in ("domain", "host"):
        raise UserError(f"--per {per}: choose domain or host.")
    pipeline = Pipeline.open(corpus)
    if STRENGTH not in pipeline.score_names:
        raise UserError(f'{corpus}: its documents have no strength; put a transform of kind "strength" into its recipe.')
    assert pipeline.phases
    values, names = [], []
    for part in pipeline.parts.present():
        for batch in pipeline.parts.kept(part):
            values.append(score_of(batch.column("scores"), STRENGTH, np.nan))
            names += groups_of(batch, per)
    means = group_means(np.concatenate(values or [np.zeros(0)]), names)
    ranked, counts = sorted(means, key=lambda name: (-means[name], name)), Counter(names)
    shown = ranked if len(ranked) <= 2 * groups else [*ranked[:groups], "...", *ranked[-groups:]]
    table = Table(per, "mean predictive strength", "documents", title=str(corpus))
    for name in shown:
        table.add_row(escape(name), f"{means[name]:.4f}" if name in means else "", f"{counts[name]:,}" if name in means else "")
    Console().print(table)
