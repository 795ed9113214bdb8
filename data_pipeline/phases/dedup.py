"""Deduplication of documents: exact (by content hash) and near (MinHash LSH), as map -> reduce -> apply.

The map is done in curation: content hashes and band keys stand beside each part. The reduce is divided by ranges of hashes, so that each task
sorts a bounded number of keys whatever the size of the corpus. Readers of the parts apply the result.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from regrowth.data_pipeline.phases.base import Phase
from regrowth.data_pipeline.phases.curate import Parts, document_key, load, save
from regrowth.data_pipeline.transform_config import MinHashDedup
from regrowth.errors import UserError

if TYPE_CHECKING:
    from regrowth.data_pipeline.pipeline import Pipeline

_KEYS_PER_TASK = 1 << 23  # 8 million keys: about half a gigabyte while they are sorted


class Removals:
    """Which documents a deduplication removed, and in whose favour: arrays [n, 2 or 3] of (document, keeper, cluster size), sorted."""

    def __init__(self, name: str, reason: str, phase: Phase) -> None:
        self.name, self.reason, self.phase = name, reason, phase

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        """The tables of all tasks, memory-mapped."""
        return [load(self.phase.path(task, ".removed.npy")) for task in range(len(self.phase.task_sizes))]

    def rows(self, part: int) -> np.ndarray:
        """Rows of a part that are removed, sorted."""
        low, high = part << 32, (part + 1) << 32
        found = []
        for array in self.arrays:
            begin, stop = np.searchsorted(array[:, 0], [low, high])
            here = array[begin:stop]
            found.append(here[here[:, 0] != here[:, 1], 0] - low)
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def of(self, part: int, row: int) -> tuple[int, int] | None:
        """(keeper, cluster size) of a document that is in a cluster; the keeper's own is the document itself."""
        key = int(document_key(part, np.array([row]))[0])
        for array in self.arrays:
            place = int(np.searchsorted(array[:, 0], key))
            if place < len(array) and array[place, 0] == key:
                return int(array[place, 1]), int(array[place, 2]) if array.shape[1] > 2 else 0
        return None


def total_documents(parts: Parts) -> int:
    """Documents in the parts of a segment."""
    return sum(parts.phase.summary["documents"])


class ExactPhase(Phase):
    """The first document of each content hash is kept; the rest are removed in its favour."""

    kind = "exact_dedup"

    def __init__(self, pipeline: "Pipeline", number: int, parts: Parts) -> None:
        super().__init__(pipeline, number)
        self.parts = parts
        self.removals = Removals(self.kind, "duplicate", self)

    def sizes(self) -> list[int]:
        """One task for every 8 million documents."""
        documents = total_documents(self.parts)
        tasks = max(1, -(-documents // _KEYS_PER_TASK))
        return [16 * documents // tasks] * tasks

    def run(self, task: int) -> dict[str, Any]:
        """Sort the hashes of one range and note every one that was met before."""
        tasks = len(self.task_sizes)
        hashes, keys = [], []
        for part in self.parts.present():
            kept = self.parts.kept_rows(part, self.parts.phase.summary["documents"][part])
            for start, batch in self.parts.batches(part):
                column = batch.column("content_hash")
                halves = np.frombuffer(column.buffers()[1], "<u8", count=2 * len(batch), offset=16 * column.offset).reshape(-1, 2)
                mine = kept[start : start + len(batch)] & ((halves[:, 0] % np.uint64(tasks) == task) if tasks > 1 else True)
                hashes.append(halves[mine].copy())
                keys.append(document_key(part, np.arange(start, start + len(batch)))[mine])
        removed = np.zeros((0, 2), np.int64)
        if hashes:
            halves, documents = np.concatenate(hashes), np.concatenate(keys)
            order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: among equals, the earliest document comes first
            same = np.zeros(len(order), dtype=bool)
            same[1:] = (halves[order][1:] == halves[order][:-1]).all(axis=1)
            firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
            removed = np.stack([documents[order][same], documents[order][firsts[same]]], axis=1)
        save(self.path(task, ".removed.npy"), removed[np.argsort(removed[:, 0])])
        return {"removed": len(removed)}


class BandsPhase(Phase):
    """Pairs of documents that share a band of their MinHash signatures: one task a band, or a range of a band's keys."""

    kind = "minhash_bands"

    def __init__(self, pipeline: "Pipeline", number: int, parts: Parts, config: MinHashDedup) -> None:
        super().__init__(pipeline, number)
        self.parts, self.config = parts, config

    def sizes(self) -> list[int]:
        """Bands times the ranges that each is divided into."""
        documents = total_documents(self.parts)
        ranges = max(1, -(-documents // _KEYS_PER_TASK))
        return [8 * documents // ranges] * (self.config.bands * ranges)

    def run(self, task: int) -> dict[str, Any]:
        """Sort the keys of one range of one band; every document with an earlier one's key is tied to it.

        Raises:
            UserError: a part's signatures were made with other settings.
        """
        ranges = len(self.task_sizes) // self.config.bands
        band, range_ = divmod(task, ranges)
        found, documents = [], []
        for part in self.parts.present():
            record, path = self.parts.phase.record(part), self.parts.phase.path(part, ".bands.npy")
            if record["minhash"] != self.config.model_dump(mode="json"):
                raise UserError(f"{path}: made with {record['minhash']}, wanted are {self.config.model_dump(mode='json')}. Signatures of different settings "
                                "cannot be compared; build the corpus in a folder of its own.")  # fmt: skip
            keys = load(path)[band]
            use = self.parts.kept_rows(part, len(keys)) & (keys != 0)
            if ranges > 1:
                use &= keys % np.uint64(ranges) == range_
            found.append(keys[use])
            documents.append(document_key(part, np.flatnonzero(use)))
        edges = np.zeros((0, 2), np.int64)
        if found:
            keys, names = np.concatenate(found), np.concatenate(documents)
            order = np.argsort(keys, kind="stable")
            same = np.zeros(len(order), dtype=bool)
            same[1:] = keys[order][1:] == keys[order][:-1]
            firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
            edges = np.stack([names[order][firsts[same]], names[order][same]], axis=1)
        save(self.path(task, ".edges.npy"), edges)
        return {"pairs": len(edges)}


class ClustersPhase(Phase):
    """Clusters of near-duplicates by union-find over the pairs of all bands; one document of each is kept.

    One task, whose memory is in proportion to the documents that have a near-duplicate.
    """

    kind = "minhash_dedup"
    single = True

    def __init__(self, pipeline: "Pipeline", number: int, bands: BandsPhase) -> None:
        super().__init__(pipeline, number)
        self.bands = bands
        self.removals = Removals(self.kind, "near_duplicate", self)

    def run(self, task: int) -> dict[str, Any]:
        """Join the pairs, choose the keepers, write (document, keeper, cluster size) for every document in a cluster."""
        from regrowth.data_pipeline.text.shingles import union

        edges = np.zeros((0, 2), np.int64)
        for band in range(len(self.bands.task_sizes)):
            more = np.asarray(load(self.bands.path(band, ".edges.npy")))
            if len(more):
                edges = np.unique(np.concatenate([edges, more]), axis=0)
        documents, places = np.unique(edges, return_inverse=True)
        roots = union(places.reshape(-1, 2).astype(np.int64), len(documents))
        weights = np.concatenate([*self._weights(documents), np.zeros(0)])
        # The best of a cluster: greatest weight, then the earliest.
        order = np.lexsort((documents, -weights, roots))
        leads = np.ones(len(order), dtype=bool)
        leads[1:] = roots[order][1:] != roots[order][:-1]
        group = np.cumsum(leads) - 1
        sizes = np.bincount(group, minlength=0)
        table = (
            np.stack([documents[order], documents[order][np.flatnonzero(leads)[group]], sizes[group]], axis=1)
            if len(order)
            else np.zeros((0, 3), np.int64)
        )
        save(self.path(task, ".removed.npy"), table[np.argsort(table[:, 0])])
        return {"removed": int((table[:, 0] != table[:, 1]).sum()), "clusters": int(leads.sum()), "largest": int(sizes.max(initial=0))}

    def _weights(self, documents: np.ndarray) -> Iterator[np.ndarray]:
        parts = documents >> 32
        for part in np.unique(parts):
            weights = load(self.bands.parts.phase.path(int(part), ".weights.npy"))
            yield weights[documents[parts == part] & 0xFFFFFFFF]
