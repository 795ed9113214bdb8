"""`data select train-family`: small models that differ in size or training, scored on a target, so that predictive strength can be had offline and for anything."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.select.choices import accuracy, read_items
from regrowth.data_pipeline.select.config import Losses, ModelSet, ScoredModel
from regrowth.data_pipeline.select.pool import Pool
from regrowth.errors import UserError
from regrowth.files import fingerprint, read_json, write_json, write_text
from regrowth.launch.many_runs import checkpoint_at, train_all
from regrowth.launch.selection_config import Family, SelectionRecipe
from regrowth.launch.training import tokenizer_of
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import to_toml

if TYPE_CHECKING:
    from regrowth.data_pipeline.select.loss_model import LossModel

TARGET = "target"  # the name of the score


def train_family(recipe: SelectionRecipe, pool: Pool, target: Pool | None, at_once: int, console: Console) -> Path:
    """Train what is missing of the family, score it, and write the list of its models; returns where that is.

    Raises:
        UserError: the recipe has no family, or nothing to score it on, or two models score the same.
    """
    family = recipe.family
    if family is None or not recipe.training:
        raise UserError("the recipe has no [family] with a [training]: name what is trained, and how its models differ.")
    if target is None and not family.choices:
        raise UserError("family: there is nothing to score its models on: give the recipe a [target], or family.choices.")
    configs = [_config(recipe, family, number, pool) for number in range(len(family.members))]
    finished = dict(train_all(configs, at_once, "family", console, lambda _, run: run))
    runs = [finished[number] for number in range(len(configs))]
    models, flops = [], 0.0
    for member, config, run in zip(family.members, configs, runs, strict=True):
        flops += _flops(config)
        for step in family.steps or [None]:
            name = member.name if step is None else f"{member.name}-{step}"
            models.append(_scored(name, _exported(recipe.out / "family" / name, checkpoint_at(run, step), run, config), family, target))
    seconds = sum(row["seconds"] for run in runs for row in run.rows("metrics"))
    write_json(recipe.out / "family" / "cost.json", {"flops": flops, "seconds": seconds})
    listed = ModelSet(higher_is_better=bool(family.choices), models=models)
    write_text(recipe.family_models(), to_toml(listed))
    _show(listed, flops, seconds, console)
    return recipe.family_models()


def _config(recipe: SelectionRecipe, family: Family, number: int, pool: Pool) -> RunConfig:
    member = family.members[number]
    config = recipe.run_config(f"family-{member.name}", pool.root, 1000 + number, member.set, recipe.out / "family" / "runs")
    if not family.steps:
        return config
    if max(family.steps) > config.run.steps:
        raise UserError(
            f"family.steps: {max(family.steps)} is past the end of {member.name}'s run (training.run.steps = {config.run.steps})."
        )
    every = math.gcd(*family.steps)
    return config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"every": every, "keep": config.run.steps // every + 1})}
    )


def _flops(config: RunConfig) -> float:
    tokens = config.run.steps * config.loader.global_batch * config.loader.sequence_length
    return float(tokens) * config.model.train_flops_per_token(config.loader.sequence_length)


def _exported(folder: Path, checkpoint: Path, run: RunFolder, config: RunConfig) -> Path:
    from regrowth.pretrain.checkpoint import identity_of

    mark = folder.with_name(f"{folder.name}.exported.json")  # not among the model's own files, by which it is known again
    identity = identity_of(checkpoint)
    if mark.exists() and read_json(mark)["checkpoint"] != identity:
        raise UserError(f"{folder}: exported from another checkpoint. Remove it; it is made again.")
    if not mark.exists():
        with exported(checkpoint, run, config) as made:
            shutil.copytree(made, folder, dirs_exist_ok=True)
        write_json(mark, {"checkpoint": identity})
    return folder


@contextmanager
def exported(checkpoint: Path, run: RunFolder, config: RunConfig) -> Iterator[Path]:
    """A checkpoint as a folder of transformers, for as long as it is looked at."""
    from regrowth.pretrain.convert import export_hf

    with tempfile.TemporaryDirectory() as folder:
        export_hf(checkpoint, Path(folder) / "hf", tokenizer_of(run), config.loader.sequence_length)
        yield Path(folder) / "hf"


def _scored(name: str, path: Path, family: Family, target: Pool | None) -> ScoredModel:
    """A model with its score, which is taken once."""
    from regrowth.data_pipeline.select.loss_model import LossModel

    there, record = (path.with_name(f"{path.name}.{what}.json") for what in ("exported", "score"))
    what = family.model_dump(mode="json", include={"documents", "choices", "items"})
    mark = fingerprint([read_json(there), what, target.mark if target and not family.choices else None])
    if not record.exists() or read_json(record)["mark"] != mark:
        judge = LossModel(str(path.resolve()), Losses(), "family")
        score = (
            mean_accuracy(judge, family.choices, family.items) if family.choices else bits_per_character(judge, target, family.documents)
        )
        judge.close()
        write_json(record, {"mark": mark, "score": round(score, 6)})
    return ScoredModel(name=name, path=str(path.resolve()), scores={TARGET: read_json(record)["score"]})


def mean_accuracy(judge: "LossModel", sets: list[Path], items: int) -> float:
    """Over multiple-choice sets."""
    return float(np.mean([accuracy(judge, read_items(path, items))[0] for path in sets]))


def bits_per_character(judge: "LossModel", target: Pool | None, documents: int) -> float:
    """Of a sample of the target's training text; held-out text is the judge's alone."""
    assert target is not None
    scored = judge.score(target.sample(documents, seed=7).texts)
    known = ~np.isnan(scored.nats)
    return float(scored.nats[known].sum() / scored.characters[known].sum() / np.log(2))


def _show(models: ModelSet, flops: float, seconds: float, console: Console) -> None:
    table = Table(
        "model",
        "accuracy" if models.higher_is_better else "bits per character of the target",
        title=f"family: {flops:.2e} FLOPs, {seconds:.0f} s of training",
    )
    for model in models.models:
        table.add_row(model.name, f"{model.scores[TARGET]:.4f}")
    console.print(table)
