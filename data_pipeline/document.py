"""The document: a pyarrow schema, not a class. A batch of documents is a `pa.RecordBatch` with these columns.

`id` names a document for good (hash of where it came from); `lineage` is the chain of what made it, oldest first; `level` is its
processing level (Data Darwinism: 0 acquired, 1 normalised, 2 filtered and deduplicated, ...); `meta` is a JSON object of whatever
else its source knew.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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
        pa.field("meta", pa.string(), nullable=False),
    ]
)

# A dropped document keeps everything it had, and says which transform dropped it and why.
DROPPED = DOCUMENT.append(pa.field("transform", pa.string())).append(pa.field("reason", pa.string()))


class Raw(NamedTuple):
    """A document as a source hands it over. `dropped` names a reason why the source itself could not use it."""

    text: str
    domain: str
    source: str  # where it came from: a path, or path#line
    meta: dict[str, Any] = {}
    dropped: str = ""


def document_id(source: str) -> str:
    """A stable name: the same place gives the same id on every run and every machine that sees the same path."""
    return xxhash.xxh3_128_hexdigest(source.encode("utf-8", "surrogatepass"))


def to_batches(documents: Iterable[Raw], bytes_per_batch: int = 8 << 20) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Group raw documents into pairs (usable documents, documents the source dropped) of about `bytes_per_batch` of text."""
    held: list[Raw] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.text) + 64
        if size >= bytes_per_batch:
            yield _batch([d for d in held if not d.dropped]), _dropped_batch([d for d in held if d.dropped])
            held, size = [], 0
    if held:
        yield _batch([d for d in held if not d.dropped]), _dropped_batch([d for d in held if d.dropped])


def _batch(documents: list[Raw]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            pa.array([document_id(d.source) for d in documents], pa.string()),
            pa.array([d.text.encode("utf-8", "replace").decode() for d in documents], pa.large_string()),
            pa.array([d.domain for d in documents], pa.string()),
            pa.array([d.source.encode("utf-8", "replace").decode() for d in documents], pa.string()),
            pa.array([0] * len(documents), pa.int8()),
            pa.array([[] for _ in documents], pa.list_(pa.string())),
            pa.array([json.dumps(d.meta) if d.meta else "{}" for d in documents], pa.string()),
        ],
        schema=DOCUMENT,
    )


def _dropped_batch(documents: list[Raw]) -> pa.RecordBatch:
    return mark_dropped(_batch(documents), "source", [d.dropped for d in documents])


def mark_dropped(batch: pa.RecordBatch, transform: str, reasons: list[str]) -> pa.RecordBatch:
    """A batch of documents as a batch of dropped documents, one reason each."""
    columns = [*batch.columns, pa.array([transform] * len(batch), pa.string()), pa.array(reasons, pa.string())]
    return pa.RecordBatch.from_arrays(columns, schema=DROPPED)
