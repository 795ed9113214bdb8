"""The commands below `data select`."""

from pathlib import Path
from typing import Annotated

import typer

from regrowth.launch.arguments import Config, DryRun, Overrides

select_app = typer.Typer(help="Selectors: fit them, and see which subset of a pool trains best.", no_args_is_help=True)
Only = Annotated[str, typer.Option(help="Of the recipe's selectors, as NAME,NAME; default all.")]
AtOnce = Annotated[int, typer.Option(help="Runs at the same time.", min=1)]


@select_app.command("fit")
def select_fit(recipe: Config, overrides: Overrides = None, only: Only = "", dry_run: DryRun = False) -> None:
    """Fit a recipe's selectors to its pool."""
    from regrowth.launch.selection import fit as go

    go(recipe, overrides or [], only, dry_run)


@select_app.command("describe")
def select_describe(
    selector: Annotated[Path, typer.Argument(help="A fitted selector's folder.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the record as it is.")] = False,
) -> None:
    """What a selector was fitted to, what was found out, what it cost."""
    from regrowth.launch.selection import describe as go

    go(selector, json_)


@select_app.command("strength")
def select_strength(
    corpus: Annotated[Path, typer.Argument(help="A corpus whose recipe has a `strength` transform.")],
    groups: Annotated[int, typer.Option(help="To list of each end.", min=1)] = 15,
    per: Annotated[str, typer.Option(help="domain or host.")] = "host",
) -> None:
    """Domains or hosts of a corpus by mean predictive strength."""
    from regrowth.launch.selection import strength as go

    go(corpus, groups, per)


@select_app.command("train-family")
def select_train_family(recipe: Config, overrides: Overrides = None, at_once: AtOnce = 1) -> None:
    """Train a family of small models on the pool and score them on the target: a model set for predictive strength."""
    from regrowth.launch.selection import train_family as go

    go(recipe, overrides or [], at_once)


@select_app.command("compare")
def select_compare(
    recipe: Config,
    overrides: Overrides = None,
    only: Only = "",
    table: Annotated[bool, typer.Option("--table", help="Show what there is; train nothing.")] = False,
) -> None:
    """Train the same model on each selector's subset and measure it on the target. Run it again to go on."""
    from regrowth.launch.judge import compare as go

    go(recipe, overrides or [], only, table)
