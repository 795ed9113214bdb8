"""Where a document came from and what became of it; and which documents of a source are left."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc, read_stream
from regrowth.data_pipeline.phases.curate import CuratePhase
from regrowth.data_pipeline.phases.dedup import ClustersPhase, ExactPhase
from regrowth.data_pipeline.phases.keep_best import KeepBestPhase
from regrowth.data_pipeline.phases.line_dedup import LineDedupPhase
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.errors import UserError
from regrowth.files import read_json


@dataclass
class Trace:
    """A document's way, in order."""

    id: str
    source: str
    domain: str
    level: int
    scores: dict[str, float]
    meta: str
    steps: list[str] = field(default_factory=list)
    text: str = ""


def trace(pipeline: Pipeline, document: str) -> Trace:
    """Follow a document by its id (or the beginning of one) from its source to its shard or to where it was dropped.

    Reads the id columns of all parts, so it takes a moment on a large corpus.

    Raises:
        UserError: no document has this id, or several begin with it.
    """
    found: Trace | None = None
    for phase in pipeline.phases:
        if isinstance(phase, CuratePhase) and phase.settled:
            for path, first, batch, row in _rows(sorted(phase.folder.glob("part-*.arrow")), document):
                found = _same(found, batch, row, document)
                part = int(path.stem.removeprefix("part-"))
                found.steps += [*_transform_steps(phase, part), *_dedup_steps(pipeline, phase, part, first + row)]
    for _, _, batch, row in _rows(sorted((pipeline.root / "dropped").glob("*.arrow")), document):
        found = _same(found, batch, row, document)
        found.meta = batch.column("meta")[row].as_py()
        found.steps.append(f"dropped by {batch.column('transform')[row].as_py()}: {batch.column('reason')[row].as_py()}")
    for path, _, batch, row in _rows(_shards(pipeline), document):
        if found is not None:
            tokens = len(batch.column("tokens")[row].values)
            found.steps.append(f"sharded: {path.relative_to(pipeline.root)}, {tokens:,} tokens")
    if found is None:
        raise UserError(
            f'{pipeline.root}: no document has the id "{document}". `regrowth data inspect SHARD` shows ids; `--source` finds them by file.'
        )
    return found


def _same(found: Trace | None, batch: pa.RecordBatch, row: int, document: str) -> Trace:
    identity = batch.column("id")[row].as_py()
    if found is not None and found.id != identity:
        raise UserError(f'"{document}": several documents begin so ({found.id}, {identity}); give more of the id.')
    if found is None:
        found = Trace(identity, batch.column("source")[row].as_py(), batch.column("domain")[row].as_py(), 0, {}, "")
    found.level = batch.column("level")[row].as_py()
    found.scores = {name: round(value, 6) for name, value in batch.column("scores")[row].as_py()}
    found.meta = batch.column("meta")[row].as_py()
    found.text = batch.column("text")[row].as_py()
    return found


def _shards(pipeline: Pipeline) -> list[Path]:
    """The shards of the finished corpus: those its manifest names, not whatever lies about."""
    if not pipeline.finished:
        return []
    splits = read_json(pipeline.root / "corpus.json")["splits"]
    return sorted(pipeline.root / row["path"] for by_domain in splits.values() for rows in by_domain.values() for row in rows)


def _rows(paths: list[Path], document: str) -> Iterator[tuple[Path, int, pa.RecordBatch, int]]:
    """Batches that hold a document whose id begins so: the file, the number of the batch's first row, the batch, the row in it."""
    for path in paths:
        for first, batch in read_stream(path):
            match = pc.starts_with(batch.column("id"), document)
            for row in np.flatnonzero(match.to_numpy(zero_copy_only=False)):
                yield path, first, batch, int(row)


def _transform_steps(phase: CuratePhase, part: int) -> list[str]:
    versions = dict(phase.record(part).get("transforms", []))
    steps = []
    for config in phase.configs:
        chosen = config.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
        settings = ", ".join(f"{key}={value!r}" for key, value in chosen.items()) or "defaults"
        steps.append(f"{config.kind}@{versions.get(config.kind, 1)} ({settings})")
    return steps


def _dedup_steps(pipeline: Pipeline, phase: CuratePhase, part: int, row: int) -> list[str]:
    steps = []
    for dedup in pipeline.phases:
        if isinstance(dedup, LineDedupPhase) and dedup.parts.phase is phase and dedup.settled:
            repeated, units = dedup.of(part, row)
            steps.append(f"{dedup.kind}: {repeated} of {units} {dedup.config.unit}s met before")
        if isinstance(dedup, KeepBestPhase) and dedup.parts.phase is phase and dedup.settled:
            score, lowest, stays = dedup.removals.line_of(part, row)
            steps.append(
                f"{dedup.kind} ({dedup.config.score}): {'kept' if stays else 'left out'}; its score is {score:g}, the lowest kept {lowest:g}"
            )
        if not isinstance(dedup, ExactPhase | ClustersPhase) or not dedup.settled:
            continue
        if (dedup.parts if isinstance(dedup, ExactPhase) else dedup.bands.parts).phase is not phase:
            continue
        member = dedup.removals.of(part, row)
        if member is None:
            steps.append(f"{dedup.kind}: alone")
            continue
        keeper, size = member
        cluster = f"a cluster of {size}" if size else "its copies"
        if keeper == part << 32 | row:
            steps.append(f"{dedup.kind}: kept for {cluster}")
        else:
            steps.append(f"{dedup.kind}: removed in favour of {_id_of(phase, keeper)} from {cluster}")
    return steps


def _id_of(phase: CuratePhase, key: int) -> str:
    row = key & 0xFFFFFFFF
    for first, batch in read_stream(phase.path(key >> 32, ".arrow")):
        if row < first + len(batch):
            return batch.column("id")[row - first].as_py()
    return "?"


class Survivor(NamedTuple):
    """A document that is in a shard."""

    id: str
    source: str
    shard: str


@dataclass
class Survival:
    """What became of the documents of a source."""

    kept: list[Survivor]
    dropped: Counter[str]


def survivors(pipeline: Pipeline, source: str) -> Survival:
    """The documents whose source begins with `source` (a file, a folder, file@offset): those in shards, and why the others were dropped.

    Raises:
        UserError: the corpus is not finished, or nothing came from there.
    """
    if not pipeline.finished:
        raise UserError(f"{pipeline.root}: not finished; `regrowth data status` tells how far it is.")
    result = Survival([], Counter())
    for path in _shards(pipeline):
        place = str(path.relative_to(pipeline.root))
        for _, batch in read_stream(path):
            chosen = batch.filter(pc.starts_with(pc.list_element(batch.column("lineage"), 0), source))
            sources = pc.list_element(chosen.column("lineage"), 0).to_pylist()
            result.kept += [Survivor(i, s, place) for i, s in zip(chosen.column("id").to_pylist(), sources, strict=True)]
    for path in sorted((pipeline.root / "dropped").glob("*.arrow")):
        for _, batch in read_stream(path):
            chosen = batch.filter(pc.starts_with(batch.column("source"), source))
            reasons = zip(chosen.column("transform").to_pylist(), chosen.column("reason").to_pylist(), strict=True)
            result.dropped.update(f"{transform}: {reason}" for transform, reason in reasons)
    if not result.kept and not result.dropped:
        known = sorted({path for _, item in pipeline.items for path in item.paths})
        raise UserError(
            f"{pipeline.root}: no document came from {source}. Its files: {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
        )
    return result
