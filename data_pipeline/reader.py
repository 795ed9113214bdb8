"""One domain's sequences, by (epoch, block, sequence): shards are opened when they are first read, and only the block in use is laid out."""

from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from regrowth.data_pipeline.batch import make_sample_id, split_sample_id
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.order import key64, permutation, permuted
from regrowth.data_pipeline.packing import Layout, count_sequences, fill, lay_out, pad, sequences_in
from regrowth.data_pipeline.shards import Block, DamagedShard, Shard
from regrowth.errors import UserError

_OPEN_SHARDS = 64  # of a domain
_LAID_OUT = 4  # blocks of a domain
_AHEAD = 2  # blocks that are fetched while one is read: a shard's last block may be a short one


@dataclass
class Cursor:
    """Where a domain's reading stands: which epoch, which place in its permutation of blocks, which place in that block's of sequences.

    `taken` counts the sequences that were ever handed out.
    """

    epoch: int = 0
    position: int = 0
    offset: int = 0
    taken: int = 0


class Piece(NamedTuple):
    """A part of a sequence: a document's row in a block of a shard, and which of its tokens. Row -1: where documents are not told apart."""

    shard: Shard
    block: int
    row: int
    begin: int
    end: int


class Damage(NamedTuple):
    """A block that could not be read."""

    shard: str
    block: int
    tokens: int
    reason: str


class DomainReader:
    """The sequences of one domain of one split.

    Args:
        skip_damaged: whether a damaged block becomes padding (noted in `damaged`) instead of an error.
    """

    def __init__(self, corpus: Corpus, split: str, domain: str, index: int, length: int, seed: int,
                 packing: str = "chunk", skip_damaged: bool = False) -> None:  # fmt: skip
        self.corpus, self.split, self.domain, self.index, self.length, self.seed = corpus, split, domain, index, length, seed
        self.packing, self.skip_damaged = packing, skip_damaged
        self.end_of_text = corpus.tokenizer.end_of_text
        self.rows = corpus.rows(split, domain)
        self.shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        blocks = [row["blocks"] if "blocks" in row else len(self.shard(i).index.blocks) for i, row in enumerate(self.rows)]
        self.first_block = [0, *accumulate(blocks)]
        self.damaged: list[Damage] = []
        self._after: dict[tuple[int, int], list[int]] = {}  # the blocks that follow each of the last ones
        self.opened = lru_cache(maxsize=_LAID_OUT)(self._open_block)
        self.count = lru_cache(maxsize=1 << 12)(self._count)
        self.ids_in = lru_cache(maxsize=_LAID_OUT)(self._ids_in)

    @property
    def blocks(self) -> int:
        """How many blocks the domain has."""
        return self.first_block[-1]

    @cached_property
    def sequences(self) -> int:
        """Sequences of an epoch. Looks at the index of every shard (with best-fit packing, at every block)."""
        return sum(self.count(block) for block in range(self.blocks))

    def take(self, cursor: Cursor, count: int) -> list[int]:
        """The next `count` sequences as sample ids; moves the cursor. An epoch ends when every sequence of every block was taken once."""
        taken: list[int] = []
        while len(taken) < count:
            block = self.block_at(cursor.epoch, cursor.position)
            in_block = self.count(block)
            if cursor.offset == 0:
                behind = range(cursor.position + 1, min(cursor.position + 1 + _AHEAD, self.blocks))
                self._after[cursor.epoch, block] = [self.block_at(cursor.epoch, position) for position in behind]
                if len(self._after) > 2 * _LAID_OUT:
                    self._after.pop(next(iter(self._after)), None)
            # Neighbours in a block are often cut from one long document: the sequences of a block are permuted too.
            stop = min(cursor.offset + count - len(taken), in_block)
            taken += self.ids_in(cursor.epoch, block)[cursor.offset : stop].tolist()
            cursor.offset, cursor.taken = stop, cursor.taken + stop - cursor.offset
            if cursor.offset == in_block:
                cursor.offset, cursor.position = 0, cursor.position + 1
                if cursor.position == self.blocks:
                    cursor.position, cursor.epoch = 0, cursor.epoch + 1
        return taken

    def block_at(self, epoch: int, position: int) -> int:
        """The block that stands at a position of an epoch."""
        return permuted(position, self.blocks, key64(self.seed, "blocks", self.domain, epoch))

    def epochs(self, cursor: Cursor) -> float:
        """How often the domain has been read; within an epoch by blocks, each counting alike."""
        part = cursor.offset / self.count(self.block_at(cursor.epoch, cursor.position)) if cursor.offset else 0.0
        return cursor.epoch + (cursor.position + part) / max(self.blocks, 1)

    def fill(self, sample_id: int, out: tuple[np.ndarray, ...]) -> None:
        """Write a sequence into rows [T] of a batch's arrays.

        Raises:
            DamagedShard: its block is not what it was, and is not to be skipped.
        """
        _, epoch, block, sequence = split_sample_id(sample_id)
        read = self.opened(epoch, block)
        if read is None:
            pad(0, self.end_of_text, out)
            return
        layout, whole = read
        fill(layout, sequence, whole.tokens, whole.weights, self.end_of_text, out)

    def pieces(self, sample_id: int) -> list[Piece]:
        """The parts of documents that a sequence is made of, in order; none if its block is damaged and skipped."""
        _, epoch, block, sequence = split_sample_id(sample_id)
        read = self.opened(epoch, block)
        if read is None:
            return []
        layout, offsets = read[0], read[1].row_offsets
        shard, number = self.place(block)
        found = []
        for i in layout.pieces(sequence):
            source, size, row = int(layout.sources[i]), int(layout.lengths[i]), int(layout.rows[i])
            begin = source if row < 0 else source - int(offsets[row] - offsets[0])
            found.append(Piece(shard, number, row, begin, begin + size))
        return found

    def place(self, block: int) -> tuple[Shard, int]:
        """The shard of a block, and its number in it."""
        at = bisect_right(self.first_block, block) - 1
        return self.shard(at), block - self.first_block[at]

    def _open(self, number: int) -> Shard:
        return self.corpus.shard(self.rows[number])

    def _count(self, block: int) -> int:
        shard, number = self.place(block)
        if self.packing != "best_fit":
            return sequences_in(shard.index.blocks[number].tokens, self.length)
        return count_sequences(self.packing, shard.block(number)[1], self.length)

    def _look_ahead(self, epoch: int, block: int) -> None:
        """A block is being opened: those behind it will be wanted next."""
        for after in self._after.get((epoch, block), ()):
            with suppress(UserError, OSError):  # a shard that cannot be read is told when it has to be
                shard, number = self.place(after)
                shard.ahead(number)

    def _ids_in(self, epoch: int, block: int) -> np.ndarray:
        """int64: the sample ids of a block in the order of an epoch."""
        order = permutation(self.count(block), key64(self.seed, "sequences", self.domain, epoch, block))
        return order + (make_sample_id(self.index, epoch, block, len(order) - 1) - (len(order) - 1)) if len(order) else order

    def _open_block(self, epoch: int, block: int) -> tuple[Layout, Block] | None:
        """A block and its layout in an epoch; None if it is damaged and skipped."""
        shard, number = self.place(block)
        try:
            whole = shard.whole_block(number)
        except DamagedShard as error:
            if not self.skip_damaged:
                raise
            self.damaged.append(Damage(shard.shown, number, shard.index.blocks[number].tokens, str(error)))
            return None
        if whole.weights is not None and self.packing == "fixed":
            raise UserError(f'{shard.shown}: its documents weigh differently in the loss (data.shards.weight), and loader.packing = "fixed" does not tell '
                            'documents apart. Take "chunk" or "best_fit".')  # fmt: skip
        self._look_ahead(epoch, block)
        key = key64(self.seed, "pack", self.domain, epoch, block)
        return lay_out(self.packing, whole.row_offsets, self.length, key), whole
