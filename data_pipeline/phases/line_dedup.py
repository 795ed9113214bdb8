"""Deduplication of lines or paragraphs with Bloom filters: what was met before anywhere in the corpus is cut out, its first occurrence stays.

The units are divided among the filters by their hash, so that several fill side by side; each takes the parts in order, so that the result does
not depend on how many processes there are.
"""

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.document import DOCUMENT
from regrowth.data_pipeline.phases.base import OnDrop, Phase
from regrowth.data_pipeline.phases.curate import Parts, document_key, load, save
from regrowth.data_pipeline.transform_config import LineDedup
from regrowth.data_pipeline.transforms.base import Verdict, part, replaced

if TYPE_CHECKING:
    from regrowth.data_pipeline.pipeline import Pipeline


class LineDedupPhase(Phase):
    """One task a filter."""

    kind = "line_dedup"
    version = 1

    def __init__(self, pipeline: "Pipeline", number: int, parts: Parts, config: LineDedup) -> None:
        super().__init__(pipeline, number)
        self.parts, self.config = parts, config
        self._last: tuple[int, np.ndarray, np.ndarray] = (-1, np.zeros(1, np.int64), np.zeros(0, bool))

    def sizes(self) -> list[int]:
        """The filters."""
        return [1] * self.config.filters

    def run(self, task: int) -> dict[str, Any]:
        """Fill one filter with the units that are its own; note those that were there before."""
        from regrowth.data_pipeline.text.lines import bloom_insert

        c = self.config
        bits = np.zeros(int(c.memory_megabytes * 1e6) // 8, dtype=np.uint64)
        probes = max(1, round(-math.log2(c.false_positive_rate)))
        inserted, units, met = 0, 0, []
        for number in self.parts.present():
            hashes = np.array(load(self.parts.phase.path(number, ".units.npy")))
            counts = load(self.parts.phase.path(number, ".unit_counts.npy"))
            hashes[np.repeat(~self.parts.kept_rows(number, len(counts)), counts)] = 0
            if c.filters > 1:
                hashes[(hashes >> np.uint64(32)) % np.uint64(c.filters) != task] = 0
            seen = np.zeros(len(hashes), dtype=bool)
            inserted += int(bloom_insert(bits, hashes, probes, seen))
            units += int(np.count_nonzero(hashes))
            met.append(document_key(number, np.flatnonzero(seen)))
        save(self.path(task, ".seen.npy"), np.concatenate(met) if met else np.zeros(0, np.int64))
        rate = (1 - math.exp(-probes * inserted / (64 * len(bits)))) ** probes
        notes = []
        if rate > 1.05 * c.false_positive_rate:  # beyond what rounding the number of probes makes
            notes.append(
                f"{self.kind}: filter {task} is over-full: false-positive rate {rate:.2%}, asked {c.false_positive_rate:.2%}; give memory_megabytes more"
            )
        return {
            "units": units,
            "repeated": units - inserted,
            "false_positive_rate": rate,
            "asked_rate": c.false_positive_rate,
            "notes": notes,
        }

    @cached_property
    def _seen(self) -> list[np.ndarray]:
        return [load(self.path(task, ".seen.npy")) for task in range(self.config.filters)]

    def seen(self, number: int, units: int) -> np.ndarray:
        """bool [units]: which units of a part were met before."""
        out = np.zeros(units, dtype=bool)
        low, high = number << 32, (number + 1) << 32
        for array in self._seen:
            begin, stop = np.searchsorted(array, [low, high])
            out[array[begin:stop] - low] = True
        return out

    def of(self, number: int, row: int) -> tuple[int, int]:
        """How many units of a document were met before, and how many it has."""
        firsts, seen = self._units(number)
        return int(seen[firsts[row] : firsts[row + 1]].sum()), int(firsts[row + 1] - firsts[row])

    def _units(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document's units begin in a part, and which units were met before."""
        if self._last[0] != number:  # parts are read batch by batch, one after the other
            firsts = np.concatenate([[0], np.cumsum(load(self.parts.phase.path(number, ".unit_counts.npy")))])
            self._last = (number, firsts, self.seen(number, int(firsts[-1])))
        return self._last[1], self._last[2]

    def apply(self, number: int, start: int, batch: pa.RecordBatch, keep: np.ndarray, drop: OnDrop) -> pa.RecordBatch:
        """The documents of a batch that `keep` names, without their repeated units; those that lose too much are dropped: mostly_repeated."""
        from regrowth.data_pipeline.text.characters import buffers
        from regrowth.data_pipeline.text.lines import keep_units
        from regrowth.data_pipeline.transforms.prose import text_array

        firsts, seen = self._units(number)
        data, offsets = buffers(batch.column("text"))
        texts, new, removed = keep_units(data, offsets, firsts[start : start + len(batch) + 1], ~seen, self.config.unit == "paragraph")
        verdict = Verdict.keep_all(len(batch))
        verdict.drop(removed > self.config.max_removed_fraction * np.maximum(np.diff(offsets), 1), "mostly_repeated")
        trimmed = pc.utf8_trim(text_array(texts, new), characters="\n")
        verdict.drop(pc.equal(pc.binary_length(trimmed), 0).to_numpy(zero_copy_only=False), "mostly_repeated")
        chosen = pa.array(keep)
        batch = batch.filter(chosen)
        kept, gone = part(batch.select(DOCUMENT.names), Verdict(verdict.reasons[keep]), self.kind, 2)
        if gone is not None:
            drop(gone)
        trimmed = trimmed.filter(chosen).filter(pa.array(verdict.keep[keep]))
        return replaced(kept, trimmed, f"{self.kind}@{self.version}", 2)
