"""Transforms: a function of a record batch, vectorised. A filter says what it keeps and, for the rest, the first rule that failed."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.document import mark_dropped


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
    """What the runner calls: a batch in; the kept batch and the dropped one out."""

    name: str

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]: ...


class Filter:
    """Base of transforms that only drop: subclasses judge texts."""

    name = "filter"

    def judge(self, texts: pa.LargeStringArray) -> Verdict:
        """One verdict for a batch of texts."""
        raise NotImplementedError

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        verdict = self.judge(batch.column("text"))
        keep = verdict.keep
        if keep.all():
            return batch, None
        dropped = batch.filter(pa.array(~keep))
        return batch.filter(pa.array(keep)), mark_dropped(dropped, self.name, list(verdict.reasons[~keep]))


class Mapper:
    """Base of transforms that rewrite texts: subclasses map a text array to a text array of the same length."""

    name = "map"
    level = 1

    def rewrite(self, texts: pa.LargeStringArray) -> pa.LargeStringArray:
        """The new texts, in order."""
        raise NotImplementedError

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        texts = self.rewrite(batch.column("text"))
        columns = {name: batch.column(name) for name in batch.schema.names}
        columns["text"] = texts
        columns["level"] = pc.max_element_wise(columns["level"], pa.scalar(self.level, pa.int8()))
        columns["lineage"] = append_lineage(columns["lineage"], self.name)
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema), None


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
