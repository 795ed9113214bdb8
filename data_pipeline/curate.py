"""Curation: sources through transforms into curated parts, as map → reduce → apply over (rank, world_size).

    map     each item of each source: read, transform, write `curated/part-N.arrow` and `dropped/part-N.arrow`
    reduce  the content hashes of all parts, in part order: the first document of each content is kept
    apply   readers pass over the duplicates (`CuratedParts.documents`)

A part is done when its `part-N.json` stands, which is written last; a crash or a rerun repeats nothing that is done. Local processes, MPI
ranks and array tasks differ only in where (rank, world_size) come from.
"""

import collections
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.config import DataConfig, ExactDedup
from regrowth.data_pipeline.document import DOCUMENT, DROPPED, mark_dropped, to_batches
from regrowth.data_pipeline.sources.base import Item
from regrowth.data_pipeline.sources.registry import build_source
from regrowth.data_pipeline.transforms.base import Transform
from regrowth.data_pipeline.transforms.hashing import content_hashes
from regrowth.data_pipeline.transforms.registry import build_transforms
from regrowth.errors import UserError
from regrowth.files import atomic_path, read_json, write_json

_HASH = pa.field("content_hash", pa.binary(16), nullable=False)
CURATED = DOCUMENT.append(_HASH)

# (domain, transform, reason) -> documents, bytes. The reason "" counts what the transform let through.
Funnel = dict[tuple[str, str, str], tuple[int, int]]


def list_items(config: DataConfig) -> list[tuple[int, Item]]:
    """All items of all sources as (source index, item), in the order that numbers the parts.

    Raises:
        UserError: a source's path does not exist or holds nothing of its kind.
    """
    return [(number, item) for number, source in enumerate(config.sources) for item in build_source(source).items()]


def curate_rank(config: DataConfig, items: list[tuple[int, Item]], folder: Path, rank: int, world_size: int) -> int:
    """The map stage's share of one rank: every `world_size`-th item that is not done. Returns how many it did."""
    done = 0
    for number in range(rank, len(items), world_size):
        if not part_path(folder, number).with_suffix(".json").exists():
            curate_item(config, items[number], folder, number)
            done += 1
    return done


def part_path(folder: Path, number: int) -> Path:
    """Where the curated documents of an item are written."""
    return folder / "curated" / f"part-{number:05d}.arrow"


def curate_item(config: DataConfig, numbered: tuple[int, Item], folder: Path, number: int) -> None:
    """Read one item, transform it batch by batch, write what is kept and what is dropped, then the part's own record."""
    source_index, item = numbered
    transforms = build_transforms(config.transforms)
    funnel: Funnel = collections.defaultdict(lambda: (0, 0))
    kept_path, dropped_path = part_path(folder, number), folder / "dropped" / f"part-{number:05d}.arrow"
    with (
        atomic_path(kept_path) as kept_partial,
        atomic_path(dropped_path) as dropped_partial,
        pa.ipc.new_stream(str(kept_partial), CURATED) as kept,
        pa.ipc.new_stream(str(dropped_partial), DROPPED) as dropped,
    ):
        for batch, unusable in to_batches(build_source(config.sources[source_index]).read(item)):
            _count(funnel, batch, "source", "")
            _drop(funnel, dropped, unusable)
            survivors = _apply(batch, transforms, funnel, dropped)
            if len(survivors):
                hashes = content_hashes(survivors.column("text"))
                column = pa.FixedSizeBinaryArray.from_buffers(_HASH.type, len(survivors), [None, pa.py_buffer(hashes.tobytes())])
                kept.write_batch(pa.RecordBatch.from_arrays([*survivors.columns, column], schema=CURATED))
    rows = [[*key, *value] for key, value in sorted(funnel.items())]
    write_json(kept_path.with_suffix(".json"), {"item": item.describe(), "funnel": rows})


def _apply(batch: pa.RecordBatch, transforms: list[Transform], funnel: Funnel, dropped: pa.ipc.RecordBatchStreamWriter) -> pa.RecordBatch:
    for transform in transforms:
        batch, out = transform(batch)
        if out is not None:
            _drop(funnel, dropped, out)
        _count(funnel, batch, transform.name, "")
    return batch


def _drop(funnel: Funnel, writer: pa.ipc.RecordBatchStreamWriter, batch: pa.RecordBatch) -> None:
    if len(batch):
        writer.write_batch(batch)
        for reason in pc.unique(batch.column("reason")).to_pylist():
            chosen = batch.filter(pc.equal(batch.column("reason"), reason))
            _count(funnel, chosen, chosen.column("transform")[0].as_py(), reason)


def _count(funnel: Funnel, batch: pa.RecordBatch, transform: str, reason: str) -> None:
    if not len(batch):
        return
    table = pa.table({"domain": batch.column("domain"), "bytes": pc.binary_length(batch.column("text"))})
    for row in table.group_by("domain").aggregate([("bytes", "sum"), ("bytes", "count")]).to_pylist():
        documents, bytes_ = funnel[(row["domain"], transform, reason)]
        funnel[(row["domain"], transform, reason)] = (documents + row["bytes_count"], bytes_ + row["bytes_sum"])


class CuratedParts:
    """The finished parts of a corpus, read back in order, without duplicates."""

    def __init__(self, config: DataConfig, folder: Path, count: int) -> None:
        self.config, self.folder, self.count = config, folder, count
        self.duplicates = self._find_duplicates() if any(isinstance(t, ExactDedup) for t in config.transforms) else {}

    def documents(self) -> Iterator[pa.RecordBatch]:
        """Record batches of documents (schema `CURATED`), duplicates left out."""
        for number in range(self.count):
            drop = self.duplicates.get(number)
            for start, batch in self._batches(number):
                if drop is not None and len(drop):
                    keep = np.ones(len(batch), dtype=bool)
                    inside = drop[(drop >= start) & (drop < start + len(batch))] - start
                    keep[inside] = False
                    batch = batch.filter(pa.array(keep))
                if len(batch):
                    yield batch

    def funnel(self) -> Funnel:
        """What each transform let through and why it dropped the rest, summed over the parts.

        Raises:
            UserError: nothing came out, with the reasons counted.
        """
        total: Funnel = collections.defaultdict(lambda: (0, 0))
        for number in range(self.count):
            for domain, transform, reason, documents, bytes_ in read_json(part_path(self.folder, number).with_suffix(".json"))["funnel"]:
                before = total[(domain, transform, reason)]
                total[(domain, transform, reason)] = (before[0] + documents, before[1] + bytes_)
        return total

    def write_duplicates(self, funnel: Funnel) -> None:
        """Write the duplicates beside the other dropped documents and count them and the survivors in `funnel`."""
        if not any(isinstance(t, ExactDedup) for t in self.config.transforms):
            return
        path = self.folder / "dropped" / "exact_dedup.arrow"
        with atomic_path(path) as partial, pa.ipc.new_stream(str(partial), DROPPED) as writer:
            for number in range(self.count):
                drop = self.duplicates.get(number, np.zeros(0, dtype=np.int64))
                for start, batch in self._batches(number):
                    inside = drop[(drop >= start) & (drop < start + len(batch))] - start
                    chosen = batch.take(pa.array(inside)).select(DOCUMENT.names)
                    _drop(funnel, writer, mark_dropped(chosen, "exact_dedup", ["duplicate"] * len(chosen)))
        for batch in self.documents():
            _count(funnel, batch, "exact_dedup", "")

    def _batches(self, number: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        path, start = part_path(self.folder, number), 0
        try:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
                for batch in reader:
                    yield start, batch
                    start += len(batch)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: damaged ({error}). Remove it and its .json; the next run rebuilds this part alone.") from error

    def _find_duplicates(self) -> dict[int, np.ndarray]:
        """Row numbers of the documents whose content an earlier document has, by part."""
        hashes, parts, rows = [], [], []
        for number in range(self.count):
            for start, batch in self._batches(number):
                column = batch.column("content_hash")
                hashes.append(np.frombuffer(column.buffers()[1], "V16", count=len(batch), offset=16 * column.offset))
                parts.append(np.full(len(batch), number))
                rows.append(np.arange(start, start + len(batch)))
        if not hashes:
            return {}
        halves = np.concatenate(hashes).view("<u8").reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: among equals, the earliest document comes first
        same = np.zeros(len(order), dtype=bool)
        same[1:] = (halves[order][1:] == halves[order][:-1]).all(axis=1)
        part, row, late = np.concatenate(parts), np.concatenate(rows), np.sort(order[same])
        return {int(p): row[late][part[late] == p] for p in np.unique(part[late])}
