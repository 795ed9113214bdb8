"""Content hashes: the key of exact deduplication and of the held-out split."""

import numpy as np
import pyarrow as pa
import xxhash


def content_hashes(texts: pa.LargeStringArray) -> np.ndarray:
    """xxh3-128 of each text's UTF-8 bytes, as an array of 16-byte strings (dtype S16 would strip trailing nulls, hence V16)."""
    digests = b"".join(xxhash.xxh3_128_digest(text.as_buffer() or b"") for text in texts)
    return np.frombuffer(digests, dtype="V16")


def heldout_mask(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out: decided by content alone, so equal texts fall on one side and no rerun moves a document."""
    high = hashes.view(">u8").reshape(-1, 2)[:, 0] if len(hashes) else np.zeros(0, dtype=">u8")
    return high.astype(np.uint64) < np.uint64(int(fraction * 2**64))
