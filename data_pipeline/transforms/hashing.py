"""Content hashes: the key of exact deduplication and of the held-out split."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.arrow import pc


def text_bytes(texts: pa.StringArray | pa.LargeStringArray) -> tuple[list[int], memoryview]:
    """The UTF-8 bytes of all texts, as they lie in memory, and the n + 1 places between them: one text after the other, without a string of each."""
    texts = texts.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    if not len(texts) or data is None:
        return [0] * (len(texts) + 1), memoryview(b"")
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return (bounds - bounds[0]).tolist(), memoryview(data)[bounds[0] : bounds[-1]]


def content_hashes(texts: pa.LargeStringArray) -> np.ndarray:
    """xxh3-128 of each text's UTF-8 bytes, as an array of 16-byte strings (dtype S16 would strip trailing nulls, hence V16)."""
    bounds, whole = text_bytes(texts)
    return np.frombuffer(b"".join([xxhash.xxh3_128_digest(whole[a:b]) for a, b in pairwise(bounds)]), dtype="V16")


REPHRASED = "#rephrase="  # in the `source` of what was written from another document


def split_hashes(batch: pa.RecordBatch, hashes: np.ndarray) -> np.ndarray:
    """What decides on each document's split: its own content hash, or, for a rephrase, that of the text it came from. Else held-out text would be trained on in other words."""
    written = pc.match_substring(batch.column("source"), REPHRASED).to_numpy(zero_copy_only=False)
    if not written.any():
        return hashes
    out = hashes.copy()
    for row in np.flatnonzero(written):
        out[row] = np.frombuffer(bytes.fromhex(json.loads(batch.column("meta")[int(row)].as_py())["rephrased"]["text_hash"]), "V16")[0]
    return out


def heldout_mask(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out: decided by content alone, so equal texts fall on one side and no rerun moves a document."""
    high = hashes.view(">u8").reshape(-1, 2)[:, 0] if len(hashes) else np.zeros(0, dtype=">u8")
    return high.astype(np.uint64) < np.uint64(int(fraction * 2**64))
