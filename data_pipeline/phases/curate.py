"""Curation: documents through the batch-wise transforms into curated parts, one task an item of a source (or a part of the segment before).

A recipe's transforms form segments: what can be done batch by batch, then the deduplications behind it, which need all documents. The next
segment reads the parts of the one before without what was found to be duplicate; so does sharding behind the last one.
"""

import collections
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc, read_stream
from regrowth.data_pipeline.document import DOCUMENT, EMPTY, Raw, mark_dropped, to_batches
from regrowth.data_pipeline.phases.base import Funnel, OnDrop, Phase, count, funnel_rows, new_funnel
from regrowth.data_pipeline.rephrase.chunks import CountTokens, counter
from regrowth.data_pipeline.sources.registry import build_source
from regrowth.data_pipeline.transform_config import KeepBest, LineDedup, MinHashDedup
from regrowth.data_pipeline.transforms.base import Parted, Transform, score_of
from regrowth.data_pipeline.transforms.hashing import content_hashes
from regrowth.data_pipeline.transforms.registry import build_transforms
from regrowth.errors import UserError
from regrowth.files import atomic_path

if TYPE_CHECKING:
    from regrowth.data_pipeline.phases.dedup import Removals
    from regrowth.data_pipeline.phases.keep_best import Selection
    from regrowth.data_pipeline.phases.line_dedup import LineDedupPhase
    from regrowth.data_pipeline.pipeline import Pipeline

_HASH = pa.field("content_hash", pa.binary(16), nullable=False)
CURATED = DOCUMENT.append(_HASH)


def document_key(part: int, rows: np.ndarray) -> np.ndarray:
    """int64: one number for each document of a segment, ordered by (part, row)."""
    return np.int64(part) << np.int64(32) | rows.astype(np.int64)


class CuratePhase(Phase):
    """One segment: its input, its transforms, and what it computes for the deduplications behind it."""

    kind = "curate"

    def __init__(self, pipeline: "Pipeline", number: int, transforms: list[Any], dedups: list[Any], before: "Parts | None") -> None:
        super().__init__(pipeline, number)
        self.configs, self.before = transforms, before
        self.minhash = next((d for d in dedups if isinstance(d, MinHashDedup)), None)
        self.lines = next((d for d in dedups if isinstance(d, LineDedup)), None)
        self.best = [d for d in dedups if isinstance(d, KeepBest)]
        self.may_lose = before is None

    def sizes(self) -> list[int]:
        """Bytes of the items, or of the parts before."""
        if self.before is None:
            return [item.size for _, item in self.pipeline.items]
        return list(self.before.phase.summary["bytes"])

    @cached_property
    def transforms(self) -> list[Transform]:
        """The transforms, built once a process: some load models or word lists."""
        return build_transforms(self.configs)

    def release(self) -> None:
        """Stop the servers and free the models of transforms."""
        for transform in self.__dict__.pop("transforms", []):
            transform.close()

    def run(self, task: int) -> dict[str, Any]:
        """Read, transform, write what is kept and what is dropped."""
        funnel, keys = new_funnel(), _Keys(self, task)
        counted = [t.counts.copy() for t in self.transforms]
        documents = bytes_ = 0
        with contextlib.ExitStack() as stack:
            kept_partial = stack.enter_context(atomic_path(self.path(task, ".arrow")))
            kept = stack.enter_context(pa.ipc.new_stream(str(kept_partial), CURATED))
            drop = stack.enter_context(self.dropping(task, funnel))
            for batch in through(self.transforms, self._input(task, funnel, drop), funnel, drop):
                if len(batch):
                    hashes = content_hashes(batch.column("text"))
                    column = pa.FixedSizeBinaryArray.from_buffers(_HASH.type, len(batch), [None, pa.py_buffer(hashes.tobytes())])
                    kept.write_batch(pa.RecordBatch.from_arrays([*batch.columns, column], schema=CURATED))
                    keys.add(batch, hashes)
                    documents += len(batch)
                    bytes_ += pc.sum(pc.binary_length(batch.column("text"))).as_py()
        keys.write()
        counts = {t.name: dict(t.counts - before) for t, before in zip(self.transforms, counted, strict=True) if t.counts - before}
        return {
            "documents": documents,
            "bytes": bytes_,
            "funnel": funnel_rows(funnel),
            "counts": counts,
            "transforms": [[t.name, t.version] for t in self.transforms],
            "notes": [f"{t.name}: {t.note}" for t in self.transforms if t.note],
            "minhash": self.minhash.model_dump(mode="json") if self.minhash else None,
        }

    def _input(self, task: int, funnel: Funnel, drop: OnDrop) -> Iterator[pa.RecordBatch]:
        if self.before is not None:
            if task not in self.before.phase.missing:
                for batch in self.before.read(task, funnel, drop):
                    yield batch.select(DOCUMENT.names)
            return
        number, item = self.pipeline.items[task]
        config = self.pipeline.config.sources[number]
        found = False
        for batch, unusable in to_batches(build_source(config).read(item), level=config.level):
            found = True
            count(funnel, batch, "source", "")
            drop(unusable)
            if len(batch):
                yield batch
        if not found and item.piece is None:
            domain = getattr(config, "domain", None) or PurePath(item.paths[0]).name.split(".")[0]
            for _, nothing in to_batches(Raw("", domain, path, dropped=EMPTY) for path in item.paths):
                drop(nothing)


def through(transforms: list[Transform], batches: Iterator[pa.RecordBatch], funnel: Funnel, drop: OnDrop) -> Iterator[pa.RecordBatch]:
    """The batches behind all transforms, in order; what is dropped is handed to `drop`, and both are counted."""

    def one(transform: Transform, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        def finished(begun: Callable[[], Parted]) -> pa.RecordBatch:
            batch, out = begun()
            if out is not None:
                drop(out)
            count(funnel, batch, transform.name, "")
            return batch

        begun: collections.deque[Callable[[], Parted]] = collections.deque()
        for batch in batches:
            begun.append(transform.begin(batch))
            if len(begun) > transform.ahead:
                yield finished(begun.popleft())
        while begun:
            yield finished(begun.popleft())

    for transform in transforms:
        batches = one(transform, batches)
    return batches


class _Keys:
    """What the deduplications behind a segment need of its documents, written beside each part: band keys [bands, documents], weights
    [documents], unit hashes [units] and units per document. Batches are spooled to disk, for an item may hold very many documents.
    """

    def __init__(self, phase: CuratePhase, task: int) -> None:
        self.phase, self.task = phase, task
        self.spools: dict[str, _Spool] = {}
        self.counters: dict[str | None, CountTokens] = {}

    def add(self, batch: pa.RecordBatch, content: np.ndarray) -> None:
        """Compute the keys of one batch, whose content hashes are given."""
        minhash, lines, texts = self.phase.minhash, self.phase.lines, batch.column("text")
        if minhash is not None:
            from regrowth.data_pipeline.text.characters import buffers, folds
            from regrowth.data_pipeline.text.shingles import band_keys, hash_functions

            functions = hash_functions(minhash.bands * minhash.rows, minhash.seed)
            self._spool(".bands.npy", band_keys(*buffers(texts), folds(), minhash.words, *functions, minhash.bands, minhash.rows))
            best = score_of(batch.column("scores"), minhash.score, -np.inf) if minhash.keep == "best_score" else None
            lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False)
            weights = best if best is not None else lengths if minhash.keep == "longest" else np.zeros(len(batch))
            self._spool(".weights.npy", weights.astype(np.float64))
        if lines is not None:
            from regrowth.data_pipeline.text.characters import buffers, character_classes
            from regrowth.data_pipeline.text.lines import unit_hashes

            hashes, firsts = unit_hashes(*buffers(texts), character_classes(), lines.unit == "paragraph", lines.min_bytes)
            self._spool(".units.npy", hashes)
            self._spool(".unit_counts.npy", np.diff(firsts))
        for place, best in enumerate(self.phase.best):
            from regrowth.data_pipeline.phases.keep_best import score_keys

            self._spool(f".best{place}.npy", score_keys(batch, content, best, self._counter(best)))

    def _counter(self, best: KeepBest) -> CountTokens:
        if best.tokenizer not in self.counters:
            self.counters[best.tokenizer] = counter(best.tokenizer)
        return self.counters[best.tokenizer]

    def _spool(self, suffix: str, array: np.ndarray) -> None:
        if suffix not in self.spools:
            self.spools[suffix] = _Spool(array, self.phase.folder)
        self.spools[suffix].add(array)

    def write(self) -> None:
        """Write the arrays; empty ones where there was no document."""
        minhash = self.phase.minhash
        if minhash is not None and not self.spools:
            self._spool(".bands.npy", np.zeros((minhash.bands, 0), np.uint64))
            self._spool(".weights.npy", np.zeros(0))
        if self.phase.lines is not None and ".units.npy" not in self.spools:
            self._spool(".units.npy", np.zeros(0, np.uint64))
            self._spool(".unit_counts.npy", np.zeros(0, np.int64))
        for place in range(len(self.phase.best)):
            if f".best{place}.npy" not in self.spools:
                from regrowth.data_pipeline.phases.keep_best import KEYS

                self._spool(f".best{place}.npy", np.zeros(0, KEYS))
        for suffix, spool in self.spools.items():
            spool.write(self.phase.path(self.task, suffix))


class _Spool:
    """Arrays of equal leading shape, joined along their last axis through a temporary file."""

    def __init__(self, like: np.ndarray, folder: Path) -> None:
        self.dtype, self.leading, self.widths = like.dtype, like.shape[:-1], []
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the spool

    def add(self, array: np.ndarray) -> None:
        """Append an array."""
        self.widths.append(array.shape[-1])
        self.file.write(np.ascontiguousarray(array).tobytes())

    def write(self, path: Path) -> None:
        """Write the joined array as .npy."""
        self.file.seek(0)
        with atomic_path(path) as partial:
            if not sum(self.widths):  # nothing to map
                with partial.open("wb") as out:
                    np.save(out, np.zeros((*self.leading, 0), self.dtype), allow_pickle=False)
                return
            joined = np.lib.format.open_memmap(partial, mode="w+", dtype=self.dtype, shape=(*self.leading, sum(self.widths)))
            begin = 0
            for width in self.widths:
                count = int(np.prod(self.leading, dtype=np.int64)) * width
                piece = np.frombuffer(self.file.read(count * self.dtype.itemsize), self.dtype)
                joined[..., begin : begin + width] = piece.reshape(*self.leading, width)
                begin += width
            joined.flush()
            del joined


def save(path: Path, array: np.ndarray) -> None:
    """Write an array atomically."""
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def load(path: Path) -> np.ndarray:
    """Map an array of `save`.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            empty = path.stat().st_size < 4096 and np.load(file, allow_pickle=False).size == 0  # nothing cannot be mapped
        array = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: missing or damaged ({error}). Remove {path.with_suffix('').with_suffix('')}*; the next run makes it again."
        ) from error
    return array


class Parts:
    """The finished parts of a segment, and what the deduplications behind it said of their documents."""

    def __init__(self, phase: CuratePhase, removals: "list[Removals | Selection]", edits: "LineDedupPhase | None" = None) -> None:
        self.phase, self.removals, self.edits = phase, removals, edits

    def __len__(self) -> int:
        return len(self.phase.task_sizes)

    def present(self) -> list[int]:
        """The parts that there are, in order."""
        return [part for part in range(len(self)) if part not in self.phase.missing]

    def batches(self, part: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """All record batches of a part (schema `CURATED`) with the number of their first row.

        Raises:
            UserError: the part is damaged.
        """
        path = self.phase.path(part, ".arrow")
        yield from read_stream(
            path, f"Remove it and {path.with_suffix('.json').name} and the phases behind; the next run rebuilds this part alone."
        )

    def kept_rows(self, part: int, documents: int) -> np.ndarray:
        """bool [documents]: which documents of a part no deduplication removed."""
        keep = np.ones(documents, dtype=bool)
        for removal in self.removals:
            keep[removal.rows(part)] = False
        return keep

    def kept(self, part: int) -> Iterator[pa.RecordBatch]:
        """The batches of a part without what was removed; texts as they were written."""
        gone = [removal.rows(part) for removal in self.removals]
        for start, batch in self.batches(part):
            keep = np.ones(len(batch), dtype=bool)
            for rows in gone:
                keep[rows[(rows >= start) & (rows < start + len(batch))] - start] = False
            yield batch if keep.all() else batch.filter(pa.array(keep))

    def read(self, part: int, funnel: Funnel, drop: OnDrop) -> Iterator[pa.RecordBatch]:
        """The documents of a part that stay, with line edits made; the others are handed to `drop`, and both are counted."""
        gone = [removal.rows(part) for removal in self.removals]
        for start, batch in self.batches(part):
            keep, left = np.ones(len(batch), dtype=bool), batch
            for removal, rows in zip(self.removals, gone, strict=True):
                here = rows[(rows >= start) & (rows < start + len(batch))] - start
                if len(here):  # else the batch stays what it is: a mapped file, of which nothing is copied
                    chosen = batch.take(pa.array(here)).select(DOCUMENT.names)
                    drop(mark_dropped(chosen, removal.name, [removal.reason] * len(chosen)))
                    keep[here] = False
                    left = batch.filter(pa.array(keep))
                count(funnel, left, removal.name, "")
            if self.edits is not None:
                left = self.edits.apply(part, start, batch, keep, drop)
                count(funnel, left, self.edits.kind, "")
            if len(left):
                yield left
