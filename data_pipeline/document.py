"""The document: a pyarrow schema, not a class. A batch of documents is a `pa.RecordBatch` with these columns.

`id` names a document for good (hash of where it came from); `source` is that place: a file, or file@offset (a byte of the unpacked stream, a
row of a table); `lineage` is the chain of what rewrote it, oldest first; `level` is its processing level (Data Darwinism: 0 acquired,
1 normalised, 2 filtered and deduplicated, ...); `scores` are what classifiers said; `meta` is a JSON object of whatever else its source knew.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

DOCUMENT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("level", pa.int8(), nullable=False),
        pa.field("lineage", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.map_(pa.string(), pa.float32()), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
    ]
)

# A dropped document keeps everything it had, and says which transform dropped it and why.
DROPPED = DOCUMENT.append(pa.field("transform", pa.string())).append(pa.field("reason", pa.string()))


EMPTY = "empty_file"  # the reason of a file that holds nothing at all


class Raw(NamedTuple):
    """A document as a source hands it over. `dropped` names a reason why the source itself could not use it."""

    text: str
    domain: str
    source: str  # where it came from: a path, or path@offset
    meta: dict[str, Any] = {}
    dropped: str = ""


def document_id(source: str) -> str:
    """A stable name: the same place gives the same id on every run and every machine that sees the same path."""
    return xxhash.xxh3_128_hexdigest(source.encode("utf-8", "surrogatepass"))


def to_batches(documents: Iterable[Raw], bytes_per_batch: int = 8 << 20, level: int = 0) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Group raw documents into pairs (usable documents, documents the source dropped) of about `bytes_per_batch` of text."""
    held: list[Raw] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.text) + 64 + sum(len(v) for v in document.meta.values() if isinstance(v, str))
        if size >= bytes_per_batch:
            yield _parted(held, level)
            held, size = [], 0
    if held:
        yield _parted(held, level)


def _parted(documents: list[Raw], level: int) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    unusable = [d for d in documents if d.dropped]
    usable = [d for d in documents if not d.dropped] if unusable else documents
    return _batch(usable, level), mark_dropped(_batch(unusable, level), "source", [d.dropped for d in unusable])


def sound_text(value: str) -> str:
    """Text that Arrow can hold: lone surrogates (from broken JSON escapes) become U+FFFD."""
    if value.isascii():
        return value
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _batch(documents: list[Raw], level: int) -> pa.RecordBatch:
    count = len(documents)
    return pa.RecordBatch.from_arrays(
        [
            pa.array([document_id(d.source) for d in documents], pa.string()),
            pa.array([sound_text(d.text) for d in documents], pa.large_string()),
            pa.array([sound_text(d.domain) for d in documents], pa.string()),
            pa.array([sound_text(d.source) for d in documents], pa.string()),
            pa.array(np.full(count, level, dtype=np.int8)),
            pa.ListArray.from_arrays(np.zeros(count + 1, dtype=np.int32), pa.array([], pa.string())),
            pa.MapArray.from_arrays(np.zeros(count + 1, dtype=np.int32), pa.array([], pa.string()), pa.array([], pa.float32())),
            pa.array([json.dumps(d.meta) if d.meta else "{}" for d in documents], pa.string()),
        ],
        schema=DOCUMENT,
    )


def mark_dropped(batch: pa.RecordBatch, transform: str, reasons: list[str]) -> pa.RecordBatch:
    """A batch of documents as a batch of dropped documents, one reason each."""
    columns = [*batch.columns, pa.array([transform] * len(batch), pa.string()), pa.array(reasons, pa.string())]
    return pa.RecordBatch.from_arrays(columns, schema=DROPPED)
