"""Transforms: a function of a record batch, vectorised. A filter says what it keeps and, for the rest, the first rule that failed."""

import collections
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.document import mark_dropped

Parted = tuple[pa.RecordBatch, pa.RecordBatch | None]  # what is kept, what is dropped


@dataclass
class Verdict:
    """One reason per document; the empty reason keeps it. The first failing rule names the reason."""

    reasons: np.ndarray  # of str objects

    @classmethod
    def keep_all(cls, count: int) -> "Verdict":
        """Start with everything kept."""
        return cls(np.full(count, "", dtype=object))

    def drop(self, where: np.ndarray, reason: str) -> None:
        """Drop the documents `where` holds, unless an earlier rule did."""
        self.reasons[where & (self.reasons == "")] = reason

    @property
    def keep(self) -> np.ndarray:
        """The mask of what stays."""
        return (self.reasons == "").astype(bool)


class Transform(Protocol):
    """What the runner calls: a batch in; the kept batch and the dropped one out. `counts` sums whatever it counts beside documents.

    `version` changes when the same parameters come to mean something else: it is part of a corpus's fingerprint and of every lineage.
    """

    name: str
    version: int
    note: str
    counts: "collections.Counter[str]"

    ahead: int

    def __call__(self, batch: pa.RecordBatch) -> Parted: ...
    def begin(self, batch: pa.RecordBatch) -> Callable[[], Parted]: ...
    def close(self) -> None: ...


class _Base:
    name = "transform"
    ahead = 0  # batches that are begun before the first of them has to be finished
    version = 1
    level = 0  # the processing level that documents have reached behind it
    note = ""  # what people should know of this transform as it was set up

    @cached_property
    def counts(self) -> "collections.Counter[str]":
        """What it counted beside documents, since it was made."""
        return collections.Counter()

    def begin(self, batch: pa.RecordBatch) -> Callable[[], Parted]:
        """Set a batch going; what it came to is had by calling what is returned. Most transforms do all of it then."""
        return partial(self, batch)

    def __call__(self, batch: pa.RecordBatch) -> Parted:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what it holds; it is not called again."""


class Filter(_Base):
    """Base of transforms that only drop: subclasses judge texts."""

    level = 2

    def judge(self, texts: pa.LargeStringArray) -> Verdict:
        """One verdict for a batch of texts."""
        raise NotImplementedError

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        return part(batch, self.judge(batch.column("text")), self.name, self.level)


class Mapper(_Base):
    """Base of transforms that rewrite texts: subclasses map a text array to a text array of the same length."""

    level = 1

    def rewrite(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """The new texts, in order."""
        raise NotImplementedError

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        return replaced(batch, self.rewrite(batch.column("text")), f"{self.name}@{self.version}", self.level), None


def part(batch: pa.RecordBatch, verdict: Verdict, name: str, level: int) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
    """A batch as what a verdict keeps, at `level` or above, and what it drops."""
    keep = verdict.keep
    dropped = None if keep.all() else mark_dropped(batch.filter(pa.array(~keep)), name, list(verdict.reasons[~keep]))
    kept = batch if dropped is None else batch.filter(pa.array(keep))
    return with_columns(kept, level=_raised(kept, level)), dropped


def replaced(batch: pa.RecordBatch, texts: pa.LargeStringArray, step: str, level: int, **columns: pa.Array) -> pa.RecordBatch:
    """A batch with new texts (and perhaps other columns), one more link of lineage, at `level` or above."""
    return with_columns(batch, text=texts, level=_raised(batch, level), lineage=append_lineage(batch.column("lineage"), step), **columns)


def with_columns(batch: pa.RecordBatch, **columns: pa.Array) -> pa.RecordBatch:
    """The batch with some columns replaced."""
    return pa.RecordBatch.from_arrays([columns.get(name, batch.column(name)) for name in batch.schema.names], schema=batch.schema)


def _raised(batch: pa.RecordBatch, level: int) -> pa.Array:
    return pc.max_element_wise(batch.column("level"), pa.scalar(level, pa.int8()))


def append_score(scores: pa.MapArray, name: str, values: np.ndarray) -> pa.MapArray:
    """Each document's scores with one more."""
    offsets = scores.offsets.to_numpy().astype(np.int64)
    begin, stop, count = int(offsets[0]), int(offsets[-1]), len(scores)
    keys = scores.keys.slice(begin, stop - begin).to_numpy(zero_copy_only=False).astype(object)
    items = scores.items.slice(begin, stop - begin).to_numpy(zero_copy_only=False)
    places = offsets[1:] - begin
    new = (offsets - begin + np.arange(count + 1)).astype(np.int32)
    return pa.MapArray.from_arrays(
        pa.array(new), pa.array(np.insert(keys, places, name), pa.string()), pa.array(np.insert(items, places, values), pa.float32())
    )


def score_of(scores: pa.MapArray, name: str, missing: float = 0.0) -> np.ndarray:
    """float32 [n]: one named score of each document, `missing` where it has none."""
    out = np.full(len(scores), missing, dtype=np.float32)
    offsets = scores.offsets.to_numpy()
    begin, stop = int(offsets[0]), int(offsets[-1])
    if stop > begin:
        rows = np.repeat(np.arange(len(scores)), np.diff(offsets))
        named = pc.equal(scores.keys.slice(begin, stop - begin), name).to_numpy(zero_copy_only=False)
        out[rows[named]] = scores.items.slice(begin, stop - begin).to_numpy(zero_copy_only=False)[named]
    return out


def append_lineage(lineage: pa.ListArray, step: str) -> pa.ListArray:
    """Each document's chain with one more link, without a Python object per row."""
    offsets = lineage.offsets.to_numpy()
    count = len(lineage)
    rows = np.repeat(np.arange(count), np.diff(offsets))
    values = lineage.flatten().to_numpy(zero_copy_only=False)
    links = np.insert(values.astype(object), offsets[1:] - offsets[0], step)
    new_offsets = offsets - offsets[0] + np.arange(count + 1)
    assert len(links) == len(rows) + count
    return pa.ListArray.from_arrays(pa.array(new_offsets, pa.int32()), pa.array(links, pa.string()))
