"""`data select compare`: each selector's subset of one pool trains the same small model, from the same seeds, for the same tokens; what comes out is measured on the target.

What is written below the recipe's `out`: selectors/NAME, corpora/, runs/, judged/NAME-SEED.json, comparison.json and comparison.html. All of it is gone on with where it was
stopped, and nothing that stands is made again.
"""

import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.executors.cores import share_cores, usable_cores
from regrowth.data_pipeline.select.choices import Item, accuracy, read_items
from regrowth.data_pipeline.select.config import Losses
from regrowth.data_pipeline.select.pool import Pool
from regrowth.errors import UserError, nearest
from regrowth.files import fingerprint, read_json, write_json, write_text
from regrowth.launch.data import prepare_with_progress
from regrowth.launch.family import train_family
from regrowth.launch.intervals import spell
from regrowth.launch.judge_page import page
from regrowth.launch.many_runs import checkpoint_at, train_all
from regrowth.launch.selection import chosen_selectors, fit_all, load_recipe, needs_family, open_pools, with_tokenizer
from regrowth.launch.selection_config import SelectionRecipe
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import validate

_LEAST_SHARE = 0.005  # of the training: a selection that costs less is not counted in steps
_MOST_SHARE = 0.75  # a selection that costs more leaves too little to train with


@dataclass
class Outcome:
    """Of one selector."""

    name: str
    kind: str
    tokens: int  # of its subset's training text
    documents: int
    epochs: float  # for which a run reads it
    flops: float  # of the selection: fitting, scoring the pool, and the family's training where it is used
    share: float  # of a run's FLOPs
    seconds: float  # of fitting and of curating with its scores, as this machine took them, caches and all
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by seed: what was measured
    counted: dict[str, dict[str, Any]] = field(default_factory=dict)  # by seed: the same with the selection's FLOPs taken from the training
    counted_steps: int = 0


def compare(recipe: str, overrides: list[str], only: str, table_only: bool) -> None:
    """The `compare` command."""
    settings, console = load_recipe(recipe, overrides), Console()
    path = settings.out / "comparison.json"
    if not table_only:
        judge(settings, only, console)
    if not path.exists():
        raise UserError(f"{path}: nothing is compared yet; leave out --table.")
    outcomes = [Outcome(**row) for row in read_json(path)]
    baseline = settings.compare.baseline
    if baseline not in (known := [outcome.name for outcome in outcomes]):
        raise UserError(f"compare.baseline = {baseline}: {path} has no such selector; {nearest(baseline, known)}")
    console.print(table(outcomes, baseline), width=None if console.is_terminal else 130)
    write_text(path.with_suffix(".html"), page(outcomes, baseline, str(settings.out)))
    console.print(f"{path.with_suffix('.html')}, {path}", soft_wrap=True)


def judge(recipe: SelectionRecipe, only: str, console: Console) -> None:
    """Fit, select, train and measure what is missing; what there is after each seed stands in comparison.json.

    Raises:
        UserError: the recipe lacks what a comparison needs.
        RunFailed: a run failed; the rest is kept.
    """
    rules = recipe.compare
    if not recipe.training:
        raise UserError("training: the recipe has none; give the config of the run that judges ([training.run], [training.model], ...).")
    if recipe.target is None and not rules.choices:
        raise UserError("compare: there is nothing to measure; give the recipe a [target] with sources, or compare.choices.")
    chosen = chosen_selectors(recipe, only)
    if rules.baseline not in chosen:
        chosen = chosen_selectors(recipe, ",".join([rules.baseline, *chosen])) if rules.baseline in recipe.selectors else chosen
    if rules.baseline not in chosen:
        raise UserError(
            f'compare.baseline = {rules.baseline}: the recipe has no such selector; give it a section [selectors.{rules.baseline}] with kind = "random".'
        )
    pool, target = open_pools(recipe, console)
    if recipe.family and any(needs_family(recipe.selectors[name], recipe) for name in chosen):
        train_family(recipe, pool, target, rules.at_once, console)
    held = _heldout(target, rules.documents) if target else []
    choices = {path.name.split(".")[0]: read_items(path, rules.items) for path in rules.choices}
    fit_all(recipe, chosen, pool, target, console)
    outcomes = [_subset(recipe, name, config, pool, console) for name, config in chosen.items()]
    plans = [  # seed after seed, so that there is something to look at early
        (seed, outcome, root, counted)
        for seed in range(rules.seeds)
        for outcome, root in outcomes
        for counted in ((False, True) if outcome.counted_steps else (False,))
    ]
    configs = [_run(recipe, outcome, root, seed, counted) for seed, outcome, root, counted in plans]
    share_cores(usable_cores() // rules.at_once)  # runs are judged while others train,
    one_by_one = threading.Lock()  # but not while others are: transformers cannot load two models at once

    def judged(place: int, run: RunFolder) -> dict[str, Any]:
        with one_by_one:
            return _judged(recipe, run, configs[place], held, choices)

    for place, measured in train_all(configs, rules.at_once, "comparison", console, judged):
        seed, outcome, _, counted = plans[place]
        (outcome.counted if counted else outcome.runs)[str(seed)] = measured
        write_json(recipe.out / "comparison.json", [asdict(outcome) for outcome, _ in outcomes])


def _subset(recipe: SelectionRecipe, name: str, config: Any, pool: Pool, console: Console) -> tuple[Outcome, Path]:
    """A selector's corpus, and what it cost to make."""
    rules, folder = recipe.compare, recipe.out / "selectors" / name
    base = with_tokenizer(recipe.data, pool).model_dump(mode="json")
    best = {"kind": "keep_best", "score": name, "fraction": rules.fraction, "of": rules.of, "per": rules.per}
    if rules.of == "tokens":
        best["tokenizer"] = base["tokenizer"]["path"]
    transforms = [*base["transforms"], {"kind": "selector", "path": str(folder), "name": name}, best]
    values = {**base, "out": str(recipe.out / "corpora"), "name": name, "folder": None, "transforms": transforms}
    begin = time.monotonic()
    corpus = prepare_with_progress(validate(DataConfig, values, f"selectors.{name}"), console)
    clock = recipe.out / "corpora" / f"{corpus.folder.name}.seconds.json"
    if not clock.exists():
        write_json(clock, time.monotonic() - begin)
    flops, seconds = _fitting(recipe, name)
    flops += 1e6 * corpus.manifest["counts"].get("selector", {}).get(f"{name}: megaflops", 0)
    seconds += read_json(clock)
    training = recipe.run_config(name, corpus.folder, 0)
    a_step = float(training.loader.global_batch * training.loader.sequence_length)
    per_step = a_step * training.model.train_flops_per_token(training.loader.sequence_length)
    tokens = sum(corpus.tokens("train", domain) for domain in corpus.domains)
    share = flops / (per_step * training.run.steps)
    outcome = Outcome(
        name, config.kind, tokens, _documents(corpus), training.run.steps * a_step / max(tokens, 1), flops, share, seconds,
        counted_steps=round(training.run.steps * (1 - share)) if rules.count_cost and _LEAST_SHARE <= share <= _MOST_SHARE else 0,
    )  # fmt: skip
    return outcome, corpus.folder


def _fitting(recipe: SelectionRecipe, name: str) -> tuple[float, float]:
    """FLOPs and seconds of fitting a selector, with what it is made of: another selector, the family's models."""
    cost = read_json(recipe.out / "selectors" / name / "selector.json")["cost"]
    flops, seconds = cost["flops"], cost["seconds"]
    like = getattr(recipe.selectors[name], "like", None)
    if like is not None and str(like) in recipe.selectors:
        more = _fitting(recipe, str(like))
        flops, seconds = flops + more[0], seconds + more[1]
    if needs_family(recipe.selectors[name], recipe):
        family = read_json(recipe.out / "family" / "cost.json")
        flops, seconds = flops + family["flops"], seconds + family["seconds"]
    return flops, seconds


def _documents(corpus: Corpus) -> int:
    return sum(row["documents"] for rows in corpus.manifest["splits"]["train"].values() for row in rows)


def _run(recipe: SelectionRecipe, outcome: Outcome, corpus: Path, seed: int, counted: bool) -> RunConfig:
    if counted:
        return recipe.run_config(f"{outcome.name}-counted-{seed}", corpus.resolve(), seed, [f"run.steps={outcome.counted_steps}"])
    return recipe.run_config(f"{outcome.name}-{seed}", corpus.resolve(), seed)


def _heldout(target: Pool, documents: int) -> list[str]:
    """Held-out texts of the target, in the order of their hashes."""
    found = sorted(
        (
            (key, text)
            for batch in target.heldout()
            for key, text in zip(*(batch.column(c).to_pylist() for c in ("content_hash", "text")), strict=True)
        )
    )
    if not found:
        raise UserError(f"{target.root}: the target has no held-out document; raise target.heldout_fraction.")
    return [text for _, text in found[:documents]]


def _judged(recipe: SelectionRecipe, run: RunFolder, config: RunConfig, held: list[str], choices: dict[str, list[Item]]) -> dict[str, Any]:
    """Bits per byte of the target's held-out text, and accuracy on each set; taken once for a checkpoint."""
    from regrowth.data_pipeline.select.loss_model import LossModel
    from regrowth.launch.family import exported
    from regrowth.pretrain.checkpoint import identity_of

    checkpoint = checkpoint_at(run, None)
    path = recipe.out / "judged" / f"{config.run.name}.json"
    mark = fingerprint([identity_of(checkpoint), held, choices])
    if path.exists() and (there := read_json(path))["mark"] == mark:
        return there["measured"]
    with exported(checkpoint, run, config) as folder:
        model = LossModel(str(folder), Losses(), config.run.name)
        measured: dict[str, Any] = {}
        if held:
            scored = model.score(held)
            known = ~np.isnan(scored.nats)
            bytes_ = sum(len(text.encode("utf-8", "surrogatepass")) for text, use in zip(held, known, strict=True) if use)
            measured["bits_per_byte"] = float(scored.nats[known].sum() / np.log(2) / bytes_)
        for name, items in choices.items():
            measured.setdefault("accuracy", {})[name], measured.setdefault("guessing", {})[name] = accuracy(model, items)
        model.close()
    write_json(path, {"mark": mark, "measured": measured})
    return measured


def paired(outcome: Outcome, baseline: Outcome, counted: bool = False) -> dict[str, list[float]]:
    """Differences to the baseline by seed: of bits per byte (less is better) and of the mean accuracy."""
    mine = outcome.counted if counted else outcome.runs
    seeds = [seed for seed in mine if seed in baseline.runs]
    found: dict[str, list[float]] = {"bits_per_byte": [], "accuracy": []}
    for seed in seeds:
        one, other = mine[seed], baseline.runs[seed]
        if "bits_per_byte" in one:
            found["bits_per_byte"].append(one["bits_per_byte"] - other["bits_per_byte"])
        if "accuracy" in one:
            found["accuracy"].append(float(np.mean(list(one["accuracy"].values())) - np.mean(list(other["accuracy"].values()))))
    return found


def table(outcomes: list[Outcome], baseline: str) -> Table:
    """The comparison, the best first."""
    base = next(outcome for outcome in outcomes if outcome.name == baseline)
    seeds = sorted({len(outcome.runs) for outcome in outcomes})
    made = Table("selector", "bits per byte", f"- {baseline}", "accuracy", f"- {baseline}", "cost counted", "cost", "s", "epochs",
                 title=f"the same pool, the same tokens; {' to '.join(map(str, seeds))} seeds, mean difference ± 95% interval over pairs",
                 caption="accuracy: mean over sets; cost counted: bits per byte when the selection's FLOPs are taken from the training; "
                 "cost: FLOPs of the selection in those of a run; epochs: for which a run reads the subset")  # fmt: skip

    def mean(outcome: Outcome, key: str) -> float:
        values = [run[key] if key == "bits_per_byte" else np.mean(list(run[key].values())) for run in outcome.runs.values() if key in run]
        return float(np.mean(values)) if values else float("nan")

    for outcome in sorted(outcomes, key=lambda o: (mean(o, "bits_per_byte"), -mean(o, "accuracy"))):
        differences, counted = paired(outcome, base), paired(outcome, base, counted=True)
        is_base = outcome.name == baseline
        cost = "too dear" if outcome.share > _MOST_SHARE else spell(counted["bits_per_byte"]) if counted["bits_per_byte"] else ""
        made.add_row(
            outcome.name,
            _number(mean(outcome, "bits_per_byte")),
            "" if is_base or not differences["bits_per_byte"] else spell(differences["bits_per_byte"]),
            _number(mean(outcome, "accuracy")),
            "" if is_base or not differences["accuracy"] else spell(differences["accuracy"]),
            "" if is_base else cost,
            f"{outcome.share:.1%}",
            f"{outcome.seconds:.0f}",
            f"{outcome.epochs:.2f}",
        )
    return made


def _number(value: float) -> str:
    return "" if value != value else f"{value:.4f}"
