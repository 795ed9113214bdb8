"""Arguments that several commands have."""

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, as section.key=value.")]
Config = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; start nothing.")]
BudgetTokens = Annotated[
    int | None, typer.Option("--budget-tokens", min=1, help="Of rephrasing: what all answers in the cache may have cost, this time.")
]
