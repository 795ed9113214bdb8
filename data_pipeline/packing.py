"""How a block's documents become sequences of one length: a layout of pieces, made once for a block, from which single sequences are filled.

chunk      documents in an order drawn by the key, end to end, cut every `length` tokens. No padding but in the last sequence of a block (at most
           length / block_tokens, under 0.2% for 2,048 in blocks of 1M); about one document in each sequence is cut.
best_fit   documents longer than a sequence are cut into whole sequences and a rest; rests go, longest first, where the least room is left (best-fit
           decreasing; Ding et al. 2024, arXiv 2404.10830). No document that fits is ever cut; the padding depends on the lengths (docs/data.md
           tells what was measured).
fixed      the block as it is stored, cut every `length` tokens, documents not told apart: positions run through, attention sees across borders.

A layout is a pure function of the documents' sizes, the length and the key; every token of a block is in exactly one sequence. The number of
sequences does not depend on the key.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Pieces of documents, in the order in which they lie in the sequences."""

    sources: np.ndarray  # int64 [pieces], where each begins in the block
    lengths: np.ndarray  # int64 [pieces]
    rows: np.ndarray  # int64 [pieces], the document, -1 where documents are not told apart
    goes_on: np.ndarray  # bool [pieces], whether the token behind a piece is its document's own
    first: np.ndarray  # int64 [sequences + 1], the first piece of each sequence

    def pieces(self, sequence: int) -> range:
        """The pieces of a sequence."""
        return range(int(self.first[sequence]), int(self.first[sequence + 1]))


def sequences_in(tokens: int, length: int) -> int:
    """How many sequences of `length` a block of `tokens` is cut into by chunk and fixed."""
    return -(-tokens // length)


def lay_out(packing: str, row_offsets: np.ndarray, length: int, key: int) -> Layout:
    """The layout of a block.

    Args:
        packing: chunk, best_fit or fixed.
        row_offsets: int64 [documents + 1] where each document starts.
        length: sequence length.
        key: of the documents' order.
    """
    offsets = row_offsets - row_offsets[0]
    if packing == "fixed":
        return _fixed(int(offsets[-1]), length)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(offsets) - 1)
    sizes = np.diff(offsets)[order]
    order, sizes = order[sizes > 0], sizes[sizes > 0]
    return (_chunk if packing == "chunk" else _best_fit)(offsets[order], sizes, order, length)


def count_sequences(packing: str, row_offsets: np.ndarray, length: int) -> int:
    """How many sequences a block has, without its layout where that is possible."""
    if packing != "best_fit":
        return sequences_in(int(row_offsets[-1] - row_offsets[0]), length)
    return len(lay_out(packing, row_offsets, length, key=0).first) - 1


def _fixed(total: int, length: int) -> Layout:
    count = sequences_in(total, length)
    sources = np.arange(count, dtype=np.int64) * length
    lengths = np.minimum(length, total - sources)
    goes_on = sources + lengths < total
    return Layout(sources, lengths, np.full(count, -1, dtype=np.int64), goes_on, np.arange(count + 1, dtype=np.int64))


def _chunk(starts: np.ndarray, sizes: np.ndarray, order: np.ndarray, length: int) -> Layout:
    ends = np.cumsum(sizes)
    begins = ends - sizes
    total = int(ends[-1]) if len(ends) else 0
    places = np.union1d(begins, np.arange(0, total, length))  # of the pieces, in the documents laid end to end
    document = np.searchsorted(ends, places, side="right")
    stops = np.append(places[1:], total)
    first = np.searchsorted(places, np.arange(sequences_in(total, length) + 1) * length)
    return Layout(starts[document] + places - begins[document], stops - places, order[document], stops < ends[document], first)


def _best_fit(starts: np.ndarray, sizes: np.ndarray, order: np.ndarray, length: int) -> Layout:
    whole, rest = sizes // length, sizes % length
    document = np.repeat(np.arange(len(sizes)), whole)
    within = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    full_sources, full_goes_on = starts[document] + within * length, (within + 1) * length < sizes[document]
    left = np.flatnonzero(rest)
    left = left[np.argsort(-rest[left], kind="stable")]
    bin_of = np.array(_best_fit_bins(rest[left].tolist(), length), dtype=np.int64)
    by_bin = np.argsort(bin_of, kind="stable")
    tail = left[by_bin]
    counts = np.bincount(bin_of) if len(bin_of) else np.zeros(0, dtype=np.int64)
    return Layout(
        sources=np.concatenate((full_sources, starts[tail] + whole[tail] * length)),
        lengths=np.concatenate((np.full(len(document), length), rest[tail])),
        rows=order[np.concatenate((document, tail))],
        goes_on=np.concatenate((full_goes_on, np.zeros(len(tail), dtype=bool))),
        first=np.concatenate((np.arange(len(document) + 1), len(document) + np.cumsum(counts))).astype(np.int64),
    )


def _best_fit_bins(sizes: list[int], length: int) -> list[int]:
    """The bin of each size (descending): the one with the least room that is enough, the newest of those; a new one where there is none."""
    bins: list[int] = []
    room_of: dict[int, list[int]] = {}  # bins by the room they have left
    rooms: list[int] = []  # those rooms, ascending
    count = 0
    for size in sizes:
        at = bisect_left(rooms, size)
        if at == len(rooms):
            chosen, left, count = count, length - size, count + 1
        else:
            room = rooms[at]
            holders = room_of[room]
            chosen, left = holders.pop(), room - size
            if not holders:
                del room_of[room], rooms[at]
        bins.append(chosen)
        if left:
            if left not in room_of:
                room_of[left] = []
                insort(rooms, left)
            room_of[left].append(chosen)
    return bins


def blank(count: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Columns [B, T] of sequences to be filled: tokens, labels, positions, doc_ids, loss_weight, as if each held one whole document."""
    tokens, labels, positions, doc_ids = (np.empty((count, length), dtype=np.int32) for _ in range(4))
    positions[:], doc_ids[:] = np.arange(length, dtype=np.int32), 0
    return tokens, labels, positions, doc_ids, np.ones((count, length), dtype=np.float32)


def fill(
    layout: Layout, sequence: int, tokens: np.ndarray, weights: np.ndarray | None, end_of_text: int, out: tuple[np.ndarray, ...]
) -> None:
    """Write one sequence into rows [T] of columns that `blank` made.

    Args:
        tokens: [n] the block's token ids.
        weights: float32 [documents] factors of the loss; None: all 1.
        end_of_text: the label of a document's last token, and the filling.

    A document that is cut goes on in another sequence, without the context before the cut; the label of its last token here is the true one.
    """
    to_tokens, to_labels, to_positions, to_documents, to_weight = out
    first, last = layout.first[sequence : sequence + 2].tolist()
    sources, lengths, goes_on = (of_pieces[first:last].tolist() for of_pieces in (layout.sources, layout.lengths, layout.goes_on))
    begin, ends = 0, []
    for number, (source, size, more) in enumerate(zip(sources, lengths, goes_on, strict=True)):
        end = begin + size
        to_tokens[begin:end] = tokens[source : source + size]
        if number:
            to_documents[begin:end] = number
            to_positions[begin:end] -= begin
        if weights is not None:
            to_weight[begin:end] = weights[layout.rows[first + number]]
        ends.append((end - 1, tokens[source + size] if more else end_of_text))
        begin = end
    to_labels[: begin - 1] = to_tokens[1:begin]
    for place, label in ends:
        to_labels[place] = label
    if begin < len(to_tokens):
        pad(begin, end_of_text, out)


def pad(begin: int, end_of_text: int, out: tuple[np.ndarray, ...]) -> None:
    """Padding from `begin` on, in rows of columns that `blank` made: documents -1, no weight."""
    to_tokens, to_labels, to_positions, to_documents, to_weight = out
    to_tokens[begin:] = to_labels[begin:] = end_of_text
    to_positions[begin:] -= begin
    to_documents[begin:], to_weight[begin:] = -1, 0.0
