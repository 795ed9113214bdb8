"""A corpus being made: its plan (recipe, items, versions), its phases, and what its records add up to.

The plan is written first: whoever works on the corpus later, in whatever process, opens it and sees the same phases and tasks. Only who does the
work (workers, executor) may change in it. Another recipe or another input in the same folder is refused, with the difference shown.
"""

import collections
import difflib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.document import EMPTY
from regrowth.data_pipeline.phases.base import Funnel, Phase, add_funnel, new_funnel
from regrowth.data_pipeline.phases.curate import CuratePhase, Parts
from regrowth.data_pipeline.phases.dedup import BandsPhase, ClustersPhase, ExactPhase, Removals
from regrowth.data_pipeline.phases.keep_best import KeepBestPhase, Selection
from regrowth.data_pipeline.phases.line_dedup import LineDedupPhase
from regrowth.data_pipeline.phases.shard import FinishPhase, ShardPhase, TokenizerPhase
from regrowth.data_pipeline.rephrase.prompts import load_prompt
from regrowth.data_pipeline.select.config import essence
from regrowth.data_pipeline.select.record import model_mark, read_record
from regrowth.data_pipeline.select.strength import STRENGTH, load_models
from regrowth.data_pipeline.source_config import MegatronSource
from regrowth.data_pipeline.sources.base import Item
from regrowth.data_pipeline.sources.files import JSONL
from regrowth.data_pipeline.sources.paths import find_files
from regrowth.data_pipeline.sources.registry import build_source
from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.data_pipeline.transform_config import (
    Decontaminate,
    ExactDedup,
    FastTextScore,
    GlobalTransform,
    KeepBest,
    Language,
    LineDedup,
    MinHashDedup,
    Rephrase,
    SelectorScore,
    Strength,
)
from regrowth.errors import UserError
from regrowth.files import fingerprint, read_json, sha256_of, write_json
from regrowth.settings import validate

PLAN_FORMAT = 2
# Changes when the same recipe comes to give another corpus (a transform's rules, the shards' layout).
PIPELINE_VERSION = 3
# Where it is written, by whom and by which encoder does not change what is written.
_NOT_IN_FINGERPRINT = {"out": True, "name": True, "folder": True, "workers": True, "executor": True, "tokenizer": {"engine"}}


class Pipeline:
    """An opened plan."""

    def __init__(self, root: Path, plan: dict[str, Any]) -> None:
        self.root, self.plan = root, plan
        self.config = validate(DataConfig, plan["config"], str(root / "plan.json"))
        self.items = [(number, Item.restore(item)) for number, item in plan["items"]]

    @classmethod
    def plan_of(cls, config: DataConfig) -> "Pipeline":
        """The plan of a recipe's corpus, with its sources listed once; nothing is written.

        Raises:
            UserError: a source, a model or a list is missing or empty, or a file is read by two sources.
        """
        plan = {
            "format": PLAN_FORMAT,
            "version": PIPELINE_VERSION,
            "config": config.model_dump(mode="json"),
            "items": [[number, item.describe()] for number, item in _list_items(config)],
            "inputs": _inputs(config),
        }
        mark = fingerprint([PIPELINE_VERSION, _settings(config), plan["items"], plan["inputs"]], length=8)
        return cls(config.folder or config.out / f"{config.name}-{mark}", plan)

    def begin(self) -> "Pipeline":
        """Write the plan down, or go on with the one that is there.

        Raises:
            UserError: the folder holds another corpus (the difference is shown), or something else.
        """
        path = self.root / "plan.json"
        if path.exists():
            there = read_json(path)
            _refuse_difference(self.root, there, self.plan)
            if there["config"] == self.plan["config"]:
                return self
        elif self.root.exists() and any(not p.name.startswith(".") for p in self.root.iterdir()):
            raise UserError(f"{self.root}: this folder is not empty and holds no plan of a corpus. Name another with data.folder.")
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(path, self.plan)  # again where only who does the work has changed: workers read it here
        return self

    @classmethod
    def open(cls, root: Path) -> "Pipeline":
        """Open the plan in a folder.

        Raises:
            UserError: there is none, or it is another version's.
        """
        if not (root / "plan.json").exists():
            raise UserError(f"{root}: no corpus is planned here. `regrowth data run RECIPE` plans and makes one.")
        plan = read_json(root / "plan.json")
        if plan.get("format") != PLAN_FORMAT or plan.get("version") != PIPELINE_VERSION:
            raise UserError(
                f"{root}/plan.json: made by version {plan.get('version')} of the pipeline, this is {PIPELINE_VERSION}. Make the corpus again."
            )
        return cls(root, plan)

    @cached_property
    def score_names(self) -> list[str]:
        """The scores that the recipe's transforms add, in order."""
        names = [name for number, t in enumerate(self.config.transforms) for name in _scores_of(t, number, self.plan["inputs"])]
        return list(dict.fromkeys(names))

    @cached_property
    def phases(self) -> list[Phase]:
        """All phases in order; each needs those before it to be settled."""
        phases: list[Phase] = []

        def add(kind: Any, *arguments: Any) -> Any:
            phases.append(kind(self, len(phases), *arguments))
            return phases[-1]

        before: Parts | None = None
        for batchwise, dedups in _segments(self.config.transforms):
            curate = add(CuratePhase, batchwise, dedups, before)
            removals: list[Removals | Selection] = []
            edits = None
            for dedup in dedups:
                parts = Parts(curate, list(removals))
                if isinstance(dedup, ExactDedup):
                    removals.append(add(ExactPhase, parts).removals)
                elif isinstance(dedup, MinHashDedup):
                    removals.append(add(ClustersPhase, add(BandsPhase, parts, dedup)).removals)
                elif isinstance(dedup, KeepBest):
                    place = sum(isinstance(removal, Selection) for removal in removals)
                    removals.append(add(KeepBestPhase, parts, dedup, place).removals)
                else:
                    edits = add(LineDedupPhase, parts, dedup)
            before = Parts(curate, removals, edits)
        assert before is not None
        self.parts = before
        add(TokenizerPhase, before)
        add(FinishPhase, add(ShardPhase, before))
        return phases

    @property
    def finished(self) -> bool:
        """Whether the corpus stands."""
        return (self.root / "corpus.json").exists()

    def funnel(self) -> Funnel:
        """What each transform let through and why it dropped the rest, over all phases."""
        total = new_funnel()
        for record in self._records():
            add_funnel(total, record.get("funnel", []))
        return total

    def counts(self) -> dict[str, dict[str, int]]:
        """What transforms counted beside documents: masked addresses, removed lines, hits of evaluation sets."""
        total: dict[str, collections.Counter[str]] = {}
        for record in self._records():
            for name, counts in record.get("counts", {}).items():
                total.setdefault(name, collections.Counter()).update(counts)
        return {name: dict(sorted(counter.items())) for name, counter in total.items()}

    def notes(self) -> list[str]:
        """What people should know: over-full filters, evaluation items that are too short to look for."""
        return list(dict.fromkeys(note for record in self._records() for note in record.get("notes", [])))

    def given_up(self) -> list[str]:
        """The source files that failed for good and were left out, with their letters."""
        first = self.phases[0]
        if not first.settled or not first.missing:
            return []
        told = zip(first.summary["missing"], first.summary["letters"], strict=True)
        return [f"{', '.join(self.items[task][1].paths)}: {letter}" for task, letter in told]

    def _records(self) -> Any:
        for phase in self.phases:
            if phase.settled:
                yield from (phase.record(task) for task in range(len(phase.task_sizes)) if task not in phase.missing)

    def refuse_nothing_left(self) -> None:
        """After the first segment: go on only if a document is left.

        Raises:
            UserError: nothing came out, with the reasons counted.
        """
        first = self.phases[0]
        if any(first.summary["documents"]):
            return
        reasons: collections.Counter[str] = collections.Counter()
        for (_, transform, reason), (documents, _) in self.funnel().items():
            if reason and reason != EMPTY:
                reasons[f"{transform}: {reason}"] += documents
        if not reasons:
            raise UserError("data.sources: no document was found in any source. Check their paths and suffixes.")
        told = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())
        raise UserError(
            f"data.transforms: every document was dropped: {told}. Loosen the transform's limits, or check that the sources hold text."
        )


def _scores_of(transform: Any, number: int, inputs: dict[str, str]) -> list[str]:
    """The names of the scores that a transform adds."""
    if isinstance(transform, FastTextScore):
        return [transform.name]
    if isinstance(transform, SelectorScore):
        return [transform.name or transform.path.name]
    if isinstance(transform, Strength):
        begin = f"transforms.{number}.models."
        return [STRENGTH, *(f"bpc_{key.removeprefix(begin)}" for key in inputs if key.startswith(begin))]
    return ["language"] if isinstance(transform, Language) else []


def _segments(transforms: list[Any]) -> list[tuple[list[Any], list[Any]]]:
    """Runs of batch-wise transforms with the deduplications behind them. Nothing but a new segment can follow a line deduplication."""
    segments: list[tuple[list[Any], list[Any]]] = [([], [])]
    for transform in transforms:
        batchwise, dedups = segments[-1]
        if not isinstance(transform, GlobalTransform):
            if dedups:
                segments.append(([transform], []))
            else:
                batchwise.append(transform)
        else:
            if dedups and isinstance(dedups[-1], LineDedup):
                segments.append(([], [transform]))
            else:
                dedups.append(transform)
    if segments[-1][1] and isinstance(segments[-1][1][-1], LineDedup):
        segments.append(([], []))  # the cut lines are left out once, here: what is sharded is then hashed and split by its final text
    return segments


def corpus_folder(config: DataConfig) -> Path:
    """Where this recipe's corpus is or will be."""
    return config.folder or Pipeline.plan_of(config).root


def _list_items(config: DataConfig) -> list[tuple[int, Item]]:
    """All items of all sources as (source index, item), in the order that numbers the parts."""
    target = int(config.item_megabytes * 1e6)
    items = [(number, item) for number, source in enumerate(config.sources) for item in build_source(source).items(target)]
    owner: dict[str, int] = {}
    for number, item in items:
        for path in item.paths if config.sources[number].kind != "datasets" else [f"{item.paths[0]} ({item.stamp})"]:
            if owner.setdefault(path, number) != number:
                raise UserError(f"data.sources.{owner[path]} and data.sources.{number} both read {path}: its documents would be there twice under one id. "
                                "Let the paths not overlap.")  # fmt: skip
    return items


def _inputs(config: DataConfig) -> dict[str, str]:
    """Hashes of the files that transforms and tokenizers are made of: a changed model or word list is another recipe."""
    inputs = {"tokenizer": Tokenizer.load(config.tokenizer.path).hash} if config.tokenizer.path else {}
    for number, source in enumerate(config.sources):
        if isinstance(source, MegatronSource):
            inputs[f"sources.{number}.tokenizer"] = Tokenizer.load(Path(source.tokenizer)).hash
    for number, transform in enumerate(config.transforms):
        for key in transform.inputs:
            if path := getattr(transform, key):
                if not Path(path).is_file():
                    raise UserError(f"data.transforms.{number}.{key} = {path}: there is no such file.")
                inputs[f"transforms.{number}.{key}"] = sha256_of(Path(path))
        if isinstance(transform, Rephrase):
            inputs[f"transforms.{number}.model"] = transform.engine.model
            if transform.server is not None and transform.server.extra:
                inputs[f"transforms.{number}.extra"] = fingerprint(transform.server.extra)
            for style in transform.all_styles:
                inputs[f"transforms.{number}.styles.{style}"] = fingerprint(load_prompt(style, transform.prompts).model_dump(mode="json"))
        if isinstance(transform, SelectorScore):
            inputs[f"transforms.{number}.selector"] = read_record(transform.path, f"data.transforms.{number}.path")["mark"]
        if isinstance(transform, Strength):
            for model, score in zip(*load_models(transform.models_file, transform.target), strict=True):
                inputs[f"transforms.{number}.models.{model.name}"] = f"{model_mark(model.path)} {score!r}"
        if isinstance(transform, Decontaminate):
            listed = find_files(transform.path, JSONL, f"data.transforms.{number}.path")
            inputs[f"transforms.{number}.path"] = fingerprint([asdict(found) for found in listed])
    return inputs


def _settings(config: DataConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT)
    if config.shards.weight is None:  # a key that came later; corpora from before it keep their folders
        del settings["shards"]["weight"]
    for transform, plain in zip(config.transforms, settings["transforms"], strict=True):
        for key in transform.work:
            del plain[key]
        if isinstance(transform, Strength):
            plain["losses"] = essence(transform)["losses"]
    return settings


def _refuse_difference(root: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    before, after = (
        {**plan, "config": _settings(validate(DataConfig, plan["config"], str(root / "plan.json")))} for plan in (there, wanted)
    )
    if before == after:
        return
    old, new = (json.dumps(plan, indent=1, sort_keys=True, default=str).splitlines() for plan in (before, after))
    changed = [line for line in difflib.unified_diff(old, new, lineterm="", n=4) if not line.startswith(("---", "+++", "@@"))]
    shown = "\n".join(changed[:40]) + (f"\n... and {len(changed) - 40} more lines" if len(changed) > 40 else "")
    raise UserError(f"{root}: holds a corpus of another recipe or another input (- there, + wanted):\n{shown}\n"
                    "Go back to the recipe it was begun with, or name another folder.")  # fmt: skip
