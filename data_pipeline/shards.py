"""Arrow shards: tokenised documents on disk, memory-mapped back as flat token views.

Arrow IPC *stream* files (the form `datasets.Dataset.from_file` opens), one row a document, one record batch a block. One row a document
keeps lineage exact and costs 8 bytes of offset for each; a flat .bin would save those and lose the document. The index beside a shard says
where each block's token values and row offsets lie in the file, so that reading slices the mapped file: no row objects, and the cost does
not depend on document length. A block's xxh3 is checked at its first touch, the file's sha256 by `verify`.
"""

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.arrow import read_stream
from regrowth.errors import UserError
from regrowth.files import atomic_path, read_json, sha256_of, write_json

FORMAT = 1


def shard_schema(vocabulary: int, metadata: dict[str, str], scores: Sequence[str] = ()) -> pa.Schema:
    """The columns of a shard; token ids are uint16 where the vocabulary fits, `scores` a struct of the named ones (null where one is missing)."""
    token = pa.uint16() if vocabulary <= 1 << 16 else pa.int32()
    kind = pa.struct([pa.field(name, pa.float32()) for name in (scores or ("quality",))])
    fields = [
        pa.field("tokens", pa.large_list(token), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("level", pa.int8(), nullable=False),
        pa.field("lineage", pa.list_(pa.string()), nullable=False),
        pa.field("scores", kind),
        pa.field("weight", pa.float32(), nullable=False),
    ]
    return pa.schema(fields, metadata={"regrowth.format": str(FORMAT), **metadata})


@dataclass(frozen=True)
class BlockIndex:
    """Where one record batch lies: byte positions in the file, and the hash of its token values, row offsets and (unless all are 1) weights."""

    rows: int
    tokens: int
    values_offset: int
    row_offsets_offset: int
    xxh3: str
    weights_offset: int = -1  # -1: every document weighs 1


@dataclass(frozen=True)
class ShardIndex:
    """The index beside a shard."""

    format: int
    domain: str
    tokenizer_hash: str
    token_bytes: int  # width of a token id on disk
    documents: int
    tokens: int
    text_bytes: int
    size: int
    sha256: str
    blocks: list[BlockIndex] = field(default_factory=list)


class ShardWriter:
    """Collects documents of one domain into blocks and blocks into shards `NAME-000.arrow`, `NAME-001.arrow`, ... in `folder`.

    A block is written when it is full, so that at most one block is held in memory; a shard appears when it is whole.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, block_tokens: int, shard_tokens: int) -> None:
        self.folder, self.name, self.schema = folder, name, schema
        self.block_tokens, self.shard_tokens = block_tokens, shard_tokens
        self.indexes: list[tuple[str, ShardIndex]] = []  # file name and index
        self._held: list[pa.RecordBatch] = []
        self._stack, self._writer = contextlib.ExitStack(), None
        self._held_tokens = self._held_bytes = self._in_shard = self._documents = self._text_bytes = 0

    def add(self, rows: pa.RecordBatch, text_bytes: np.ndarray) -> None:
        """Add documents (of this writer's schema), already framed by the tokenizer's rule for document borders; `text_bytes` int64 [rows]."""
        ends = np.cumsum(np.diff(rows.column("tokens").offsets.to_numpy()))
        begin = 0
        while begin < len(rows):
            before = int(ends[begin - 1]) if begin else 0
            # The block ends behind the document that fills it.
            stop = min(int(np.searchsorted(ends, before + self.block_tokens - self._held_tokens)) + 1, len(rows))
            self._held.append(rows.slice(begin, stop - begin))
            self._held_tokens += int(ends[stop - 1]) - before
            self._held_bytes += int(text_bytes[begin:stop].sum())
            begin = stop
            if self._held_tokens >= self.block_tokens:
                self._end_block()
                if self._in_shard >= self.shard_tokens:
                    self._end_shard()

    def close(self) -> list[tuple[str, ShardIndex]]:
        """Write what is left and return the names and indexes of all shards."""
        self._end_block()
        self._end_shard()
        return self.indexes

    def abandon(self) -> None:
        """Remove what is not whole."""
        self._stack.pop_all().__exit__(RuntimeError, RuntimeError("abandoned"), None)

    def _end_block(self) -> None:
        if not self._held:
            return
        if self._writer is None:
            self._path = self.folder / f"{self.name}-{len(self.indexes):03d}.arrow"
            partial = self._stack.enter_context(atomic_path(self._path))
            self._writer = self._stack.enter_context(pa.ipc.new_stream(str(partial), self.schema))
        block = pa.Table.from_batches(self._held).combine_chunks().to_batches()
        assert len(block) == 1  # one record batch is one block
        self._writer.write_batch(block[0])
        self._documents += len(block[0])
        self._in_shard += self._held_tokens
        self._text_bytes += self._held_bytes
        self._held, self._held_tokens, self._held_bytes = [], 0, 0

    def _end_shard(self) -> None:
        if self._writer is None:
            return
        self._stack.close()
        path, metadata = self._path, self.schema.metadata
        index = ShardIndex(
            format=FORMAT,
            domain=metadata[b"regrowth.domain"].decode(),
            tokenizer_hash=metadata[b"regrowth.tokenizer"].decode(),
            token_bytes=self.schema.field("tokens").type.value_type.bit_width // 8,
            documents=self._documents,
            tokens=self._in_shard,
            text_bytes=self._text_bytes,
            size=path.stat().st_size,
            sha256=sha256_of(path),
            blocks=index_blocks(path),
        )
        write_json(path.with_suffix(".json"), asdict(index))
        self.indexes.append((path.name, index))
        self._writer = None
        self._documents = self._in_shard = self._text_bytes = 0


def shard_metadata(domain: str, vocabulary: int, tokenizer_hash: str) -> dict[str, str]:
    """What a shard's schema says of itself."""
    return {"regrowth.tokenizer": tokenizer_hash, "regrowth.domain": domain, "regrowth.vocabulary": str(vocabulary)}


def index_blocks(path: Path) -> list[BlockIndex]:
    """Locate every record batch's buffers in a shard, by mapping the file and asking Arrow where its views point."""
    mapped = pa.memory_map(str(path)).read_buffer()
    blocks = []
    with pa.ipc.open_stream(pa.py_buffer(mapped)) as reader:
        for batch in reader:
            column, weight = batch.column("tokens"), batch.column("weight")
            row_offsets, values = column.buffers()[1], column.values.buffers()[1]
            assert row_offsets is not None
            weighed = bool((weight.to_numpy() != 1.0).any())
            count = len(column.values)
            data = values.slice(0, count * column.values.type.bit_width // 8) if values is not None else b""
            blocks.append(
                BlockIndex(
                    rows=len(batch),
                    tokens=count,
                    values_offset=values.address - mapped.address if values is not None else 0,
                    row_offsets_offset=row_offsets.address - mapped.address,
                    xxh3=_block_hash(
                        data, row_offsets.slice(0, 8 * (len(batch) + 1)), weight.buffers()[1].slice(0, 4 * len(batch)) if weighed else b""
                    ),
                    weights_offset=weight.buffers()[1].address - mapped.address if weighed else -1,
                )
            )
    return blocks


def _block_hash(*parts: Any) -> str:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class DamagedShard(UserError):
    """What a shard holds is not what its index says."""


@dataclass(frozen=True)
class Block:
    """One block's documents, as views of the file."""

    tokens: np.ndarray  # uint16 or int32 [n]
    row_offsets: np.ndarray  # int64 [documents + 1]
    weights: np.ndarray | None  # float32 [documents]; None: all 1


def read_index(path: Path) -> ShardIndex:
    """The index beside a shard.

    Raises:
        UserError: it is missing, not an index, or of another format.
    """
    stored = read_json(path)
    try:
        index = ShardIndex(**{**stored, "blocks": [BlockIndex(**block) for block in stored["blocks"]]})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not an index of this format ({error}). Rebuild the corpus.") from error
    if index.format != FORMAT:
        raise UserError(
            f"{path.with_suffix('.arrow')}: shard format {index.format}, this version reads format {FORMAT}. Rebuild the corpus."
        )
    return index


class Shard:
    """A shard on disk, memory-mapped; blocks come as flat views of the file.

    Raises (from the constructor and from `block`):
        UserError: the shard or its index is missing, truncated or altered; it is refused by name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.shown = path, str(path)
        self.index = read_index(path.with_suffix(".json"))
        if not path.exists():
            raise UserError(f"{path}: the shard is missing, its index is there. {REMEDY}")
        if (size := path.stat().st_size) != self.index.size:
            raise UserError(f"{path}: damaged, {size:,} bytes where its index says {self.index.size:,}. {REMEDY}")
        self._mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # a plain array: slices of the subclass cost ten times as much
        self._checked: set[int] = set()

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Block `number` as (tokens [n], row offsets int64 [rows + 1]), views of the mapped file."""
        block = self.whole_block(number)
        return block.tokens, block.row_offsets

    def whole_block(self, number: int) -> Block:
        """Block `number` with the weights of its documents; its hash is checked the first time."""
        return self._block(number, self._mapped, 0)

    def _block(self, number: int, raw: np.ndarray, begin: int) -> Block:
        """Block `number` from bytes [n] that begin at the shard's byte `begin`."""
        index = self.index.blocks[number]
        values = raw[index.values_offset - begin :][: index.tokens * self.index.token_bytes]
        rows = raw[index.row_offsets_offset - begin :][: 8 * (index.rows + 1)]
        weights = raw[index.weights_offset - begin :][: 4 * index.rows] if index.weights_offset >= 0 else raw[:0]
        if number not in self._checked:
            if _block_hash(values.data, rows.data, weights.data) != index.xxh3:
                raise DamagedShard(f"{self.shown}: damaged, the tokens of block {number} do not match their hash. {REMEDY}")
            self._checked.add(number)
        dtype = np.uint16 if self.index.token_bytes == 2 else np.int32
        return Block(values.view(dtype), rows.view(np.int64), weights.view(np.float32) if index.weights_offset >= 0 else None)

    def ahead(self, number: int) -> None:
        """Block `number` will be read soon: the system is asked to read it from the disk meanwhile, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            begin, end = self._span(number)
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _span(self, number: int) -> tuple[int, int]:
        """The bytes of the shard that hold a block's tokens, row offsets and weights."""
        block = self.index.blocks[number]
        parts = [(block.row_offsets_offset, 8 * (block.rows + 1))]
        if block.tokens:
            parts.append((block.values_offset, block.tokens * self.index.token_bytes))
        if block.weights_offset >= 0:
            parts.append((block.weights_offset, 4 * block.rows))
        return min(at for at, _ in parts), max(at + size for at, size in parts)

    def table(self, number: int) -> pa.RecordBatch:
        """Block `number` with all its columns, for looking up ids and lineage; slower than `block`."""
        return next(itertools.islice(read_stream(self.path, REMEDY), number, None))[1]

    def verify(self) -> None:
        """Compare the whole file with its sha256, and the index's counts with what the file holds.

        Raises:
            UserError: it was altered, or its index does not describe it.
        """
        if sha256_of(self.path) != self.index.sha256:
            raise UserError(f"{self.path}: altered, its sha256 is not the index's. {REMEDY}")
        blocks = index_blocks(self.path)
        documents, tokens = sum(block.rows for block in blocks), sum(block.tokens for block in blocks)
        if blocks != self.index.blocks or (documents, tokens) != (self.index.documents, self.index.tokens):
            raise UserError(f"{self.path}: holds {documents:,} documents and {tokens:,} tokens in {len(blocks)} blocks; its index says "
                            f"{self.index.documents:,}, {self.index.tokens:,} and {len(self.index.blocks)}, or places them elsewhere. {REMEDY}")  # fmt: skip


REMEDY = "Remove this shard (and its .json) and run `regrowth data prepare` again; it rebuilds what is missing."


def shard_summary(index: ShardIndex, path: str) -> dict[str, Any]:
    """A shard's line in the corpus manifest."""
    counts = {"documents": index.documents, "tokens": index.tokens, "text_bytes": index.text_bytes, "blocks": len(index.blocks)}
    return {"path": path, **counts, "sha256": index.sha256}
