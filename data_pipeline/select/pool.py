"""Documents that selectors are fitted to: those of a finished corpus, without what is held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.phases.keep_best import groups_of, tie_of
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.transforms.base import score_of
from regrowth.data_pipeline.transforms.hashing import heldout_mask, split_hashes
from regrowth.errors import UserError
from regrowth.files import fingerprint

_NOT_OF_ITS_TEXT = {"out": True, "name": True, "folder": True, "workers": True, "executor": True, "tokenizer": True, "shards": True}
_SAMPLE = 0x5A4D504C  # added to seeds, so that a sample is no near relation of what `keep_best` kept at random


@dataclass(frozen=True)
class Sample:
    """Some documents, in their corpus's order."""

    texts: list[str]
    hashes: list[bytes]  # of their contents
    groups: list[str]
    scores: list[pa.MapArray]

    def __len__(self) -> int:
        return len(self.texts)

    def score(self, name: str) -> np.ndarray:
        """float32 [n]: a score that they have, NaN where they do not."""
        return np.concatenate([score_of(scores, name, np.nan) for scores in self.scores] or [np.zeros(0, np.float32)])


class Pool:
    """The training documents of a corpus as they were curated.

    Raises:
        UserError: the corpus is not finished.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.pipeline = root, Pipeline.open(root)
        if not self.pipeline.finished:
            raise UserError(f"{root}: this corpus is not finished; `regrowth data run RECIPE` goes on with it.")
        assert self.pipeline.phases  # makes its parts known
        config = self.pipeline.config.model_dump(mode="json", exclude=_NOT_OF_ITS_TEXT)
        self.mark = fingerprint([config, self.pipeline.plan["items"], self.pipeline.plan["inputs"]])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All training documents, with their content hashes."""
        return self._side(held_out=False)

    def heldout(self) -> Iterator[pa.RecordBatch]:
        """All documents that are held out."""
        return self._side(held_out=True)

    def _side(self, held_out: bool) -> Iterator[pa.RecordBatch]:
        fraction = self.pipeline.config.heldout_fraction
        for part in self.pipeline.parts.present():
            for batch in self.pipeline.parts.kept(part):
                held = heldout_mask(split_hashes(batch, content_hashes_of(batch)), fraction)
                wanted = held == held_out
                yield batch if wanted.all() else batch.filter(pa.array(wanted))

    def sample(self, documents: int, seed: int, per: str = "corpus", groups: int | None = None) -> Sample:
        """So many documents of each group, drawn by their content: the same ones wherever and in what order they lie.

        Args:
            groups: only the groups with most documents.

        Raises:
            UserError: there is no document.
        """
        share = min(1.0, 1.5 * documents / max(sum(self.pipeline.parts.phase.summary["documents"]), 1) + 1e-3) if per == "corpus" else 1.0
        places, total = self._drawn(documents, seed, per, groups, share)
        if len(places) < min(documents, total) and share < 1:  # many of the pool's documents are held out or removed
            places, total = self._drawn(documents, seed, per, groups, 1.0)
        if not total:
            raise UserError(f"{self.root}: holds no training document.")
        return self._take(places, per)

    def _drawn(self, documents: int, seed: int, per: str, groups: int | None, share: float) -> tuple[np.ndarray, int]:
        """Numbers of the documents that are drawn, sorted, and how many there are. Only those of the lowest `share` of hashes are looked at: with luck no other can be drawn."""
        names: dict[str, int] = {}
        of, ties, places, total = [], [], [], 0
        for batch in self.batches():
            tie = tie_of(content_hashes_of(batch).view("<u8").reshape(-1, 2)[:, 1], seed + _SAMPLE)
            near = np.flatnonzero(tie <= np.uint64(min(int(share * 2**64), 2**64 - 1)))
            of.append(np.array([names.setdefault(name, len(names)) for name in groups_of(batch, per)], np.int64)[near])
            ties.append(tie[near])
            places.append(total + near)
            total += len(batch)
        if not total:
            return np.zeros(0, np.int64), 0
        group, tie, place = (np.concatenate(parts) for parts in (of, ties, places))
        order = np.lexsort((place, tie, group))
        group, place = group[order], place[order]
        first = np.searchsorted(group, np.arange(len(names)))
        chosen = np.arange(len(group)) - first[group] < documents
        if groups is not None and groups < len(names):
            sizes = np.bincount(group, minlength=len(names))
            named = list(names)
            largest = sorted(range(len(named)), key=lambda g: (-sizes[g], named[g]))[:groups]
            chosen &= np.isin(group, largest)
        return np.sort(place[chosen]), total

    def _take(self, places: np.ndarray, per: str) -> Sample:
        found, begin = Sample([], [], [], []), 0
        for batch in self.batches():
            here = places[np.searchsorted(places, begin) : np.searchsorted(places, begin + len(batch))] - begin
            begin += len(batch)
            if len(here):
                some = batch.take(pa.array(here))
                found.texts.extend(some.column("text").to_pylist())
                found.hashes.extend(some.column("content_hash").to_pylist())
                found.groups.extend(groups_of(some, per))
                found.scores.append(some.column("scores"))  # pyright: ignore[reportArgumentType]
        return found


def content_hashes_of(batch: pa.RecordBatch) -> np.ndarray:
    """V16 [n]: the column of content hashes."""
    column = batch.column("content_hash")
    return np.frombuffer(column.buffers()[1], "V16", count=len(batch), offset=16 * column.offset) if len(batch) else np.zeros(0, "V16")
