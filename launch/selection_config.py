"""The recipe of a selection: a pool, what is wanted, selectors, and how they are judged."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.select.config import SelectorConfig
from regrowth.pretrain.config import RunConfig
from regrowth.settings import PlainName, Settings, merge, parse_overrides, validate

Count = Annotated[int, Field(ge=1)]


class Member(Settings):
    """A model of the family: what is different in its training."""

    name: PlainName
    set: list[str] = []  # overrides of [training], as on a command line


class Family(Settings):
    """Small models of increasing size or training, trained here on the pool and scored on the target."""

    members: list[Member] = [Member(name="model")]
    steps: list[Count] = []  # of each member's run, at which a checkpoint is a model of its own; []: the last
    documents: Count = 200  # of the target's training text, on which they are scored (bits per character)
    choices: list[Path] = []  # multiple-choice sets on which they are scored instead (mean accuracy)
    items: Count = 500  # of each set

    @model_validator(mode="after")
    def _an_order(self) -> "Family":
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError(f"members: {', '.join(names)}: names stand once")
        if len(names) * max(len(self.steps), 1) < 2:
            raise ValueError("members: one model has no order; name more members, or steps")
        return self


class Compare(Settings):
    """The judge: subsets of one size train one model, from the same seeds, for the same tokens."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of the pool, that each selector keeps
    of: Literal["characters", "tokens", "documents"] = "characters"
    per: Literal["corpus", "domain"] = "corpus"
    seeds: Count = 5
    baseline: str = "random"  # the selector that the others are compared with
    documents: Count = 300  # of the target's held-out text
    choices: list[Path] = []  # multiple-choice sets
    items: Count = 500  # of each
    at_once: Count = 1  # runs
    count_cost: bool = True  # train each selector a second time, for as much less as its selection cost


class SelectionRecipe(Settings):
    """All of it. `training` is a run's config without its data."""

    out: Path = Path("selection")
    data: DataConfig
    target: DataConfig | None = None
    selectors: dict[PlainName, SelectorConfig] = {}
    training: dict[str, Any] = {}
    family: Family | None = None
    compare: Compare = Compare()

    @field_validator("selectors")
    @classmethod
    def _one_line_each(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.isprintable():
                raise ValueError(f"{name!r} names a score and a folder: no line breaks")
        return value

    @model_validator(mode="after")
    def _judged_by_something_else(self) -> "SelectionRecipe":
        if self.family and (both := {path.resolve() for path in self.family.choices} & {path.resolve() for path in self.compare.choices}):
            raise ValueError(
                f"family.choices and compare.choices both have {', '.join(map(str, sorted(both)))}: models would be ordered by what selectors are judged by"
            )
        return self

    @model_validator(mode="after")
    def _training_is_a_run(self) -> "SelectionRecipe":
        for section in ("data", "mixing"):
            if section in self.training:
                raise ValueError(f"training.{section}: what is trained on is the selection's; leave it out")
        if self.training:
            self.run_config("check", Path("corpus"), 0)
        return self

    def run_config(self, name: str, corpus: Path, seed: int, overrides: list[str] | None = None, folder: Path | None = None) -> RunConfig:
        """The config of a run on a finished corpus.

        Raises:
            UserError: it is none, with the key named.
        """
        own = {
            "run": {"name": name, "folder": str(folder or self.out / "runs"), "seed": seed},
            "loader": {"corpus": str(corpus), "seed": seed},
        }
        return validate(RunConfig, merge(merge(self.training, own), parse_overrides(overrides or [])), "training")

    def family_models(self) -> Path:
        """Where the family's list of models is."""
        return self.out / "family" / "models.toml"
