"""The order in which a domain's tokens are read: blocks permuted by a keyed Feistel network, packing a pure function of its arguments.

Nothing here keeps state or memory in proportion to the corpus: sequence number k of an epoch is computed, not remembered.
"""

import hashlib
from dataclasses import dataclass

import numpy as np


def key64(*parts: object) -> int:
    """A 64-bit key from any printable parts; the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permuted(position: int, count: int, key: int, rounds: int = 6) -> int:
    """Where `position` of 0..count-1 goes under the permutation of `key`.

    A balanced Feistel network on the smallest even number of bits that holds `count`, walked until the value falls inside (cycle walking).
    """
    if not 0 <= position < count:
        raise IndexError(f"position {position} of {count}")
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for round_ in range(rounds):
            left, right = right, left ^ (_mix(right ^ (key + 0x9E3779B97F4A7C15 * (round_ + 1))) & mask)
        value = left << half | right
        if value < count:
            return value


def _mix(value: int) -> int:
    """splitmix64's finaliser."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


@dataclass(frozen=True)
class PackedBlock:
    """A block's documents as fixed-length sequences; arrays are [sequences, length].

    The last sequence of a block is filled up with padding (`doc_ids` -1, `loss_weight` 0), so that no token is lost or read twice.
    """

    tokens: np.ndarray  # int32
    labels: np.ndarray  # int32, already shifted: what follows each token within its document, END_OF_TEXT at its end
    positions: np.ndarray  # int32, from the document's start or the sequence's, whichever is later
    doc_ids: np.ndarray  # int32, counted from 0 in each sequence
    loss_weight: np.ndarray  # float32, 1 or 0


def sequences_in(tokens: int, length: int) -> int:
    """How many sequences of `length` a block of `tokens` packs into."""
    return -(-tokens // length)


def pack_block(tokens: np.ndarray, row_offsets: np.ndarray, length: int, end_of_text: int, key: int) -> PackedBlock:
    """Concatenate a block's documents in the order that `key` draws and cut them into sequences of `length`.

    Args:
        tokens: [n] the block's token ids, document after document.
        row_offsets: int64 [documents + 1] where each document starts.
        length: sequence length.
        end_of_text: the label of a document's last token, and the filling.
        key: the permutation of the documents.

    Documents longer than a sequence go on in the next one, without the context before the cut; about one document in each sequence is cut.
    """
    sizes = np.diff(row_offsets)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(sizes))
    starts, sizes = row_offsets[:-1][order] - row_offsets[0], sizes[order]
    total = int(sizes.sum())
    ends = np.cumsum(sizes)
    gather = np.arange(total) + np.repeat(starts - (ends - sizes), sizes)
    document = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)

    count = sequences_in(total, length)
    flat = np.full(count * length, end_of_text, dtype=np.int32)
    labels, document_of = flat.copy(), np.full(count * length, -1, dtype=np.int64)
    flat[:total] = tokens[gather]
    labels[: max(total - 1, 0)] = flat[1:total]
    labels[ends[sizes > 0] - 1] = end_of_text
    document_of[:total] = document

    begin = np.zeros(count * length, dtype=np.int64)
    begin[:total] = np.repeat(ends - sizes, sizes)
    begin[total:] = total
    place = np.arange(count * length)
    sequence_start = place // length * length
    positions = place - np.maximum(begin, sequence_start)
    document_of = document_of.reshape(count, length)
    doc_ids = np.where(document_of < 0, -1, document_of - document_of[:, :1])
    shape = (count, length)
    return PackedBlock(
        tokens=flat.reshape(shape),
        labels=labels.reshape(shape),
        positions=positions.astype(np.int32).reshape(shape),
        doc_ids=doc_ids.astype(np.int32),
        loss_weight=(document_of >= 0).astype(np.float32),
    )
