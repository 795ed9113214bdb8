"""Selectors that need no model: chance, chance with given lengths, and DSIR's hashed n-grams."""

from typing import Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.phases.curate import load, save
from regrowth.data_pipeline.select.config import Importance, LengthMatched, Random
from regrowth.data_pipeline.select.loss_store import Tell
from regrowth.data_pipeline.select.pool import Pool
from regrowth.data_pipeline.select.selector import Selector, chances, load_selector
from regrowth.errors import UserError


class RandomChoice(Selector):
    """A document's number is drawn."""

    config: Random

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """There is nothing to learn."""
        return {}

    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """Between 0 and 1."""
        return chances(batch, self.config.seed)


class RandomOfLength(Selector):
    """Drawn, with the odds of a document's length among what another selector would keep."""

    config: LengthMatched

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """Count lengths, by powers of the root of two, in the pool and in what the other keeps of it."""
        other = load_selector(self.config.like, "selectors.like")
        lengths, scores, hashes = [], [], []
        for batch in pool.batches():
            lengths.append(_lengths(batch))
            scores.append(other.score(batch))
            self._spent = other.flops
            hashes.append(chances(batch, self.config.seed))
        other.close()
        length, score, tie = (np.concatenate(parts) for parts in (lengths, scores, hashes))
        order = np.lexsort((tie, -np.nan_to_num(score, nan=-np.inf)))
        taken = np.cumsum(length[order]) - length[order] < self.config.fraction * length.sum()
        bins = _length_bin(length)
        kept = np.bincount(bins[order[taken]], minlength=64)
        odds = kept / np.maximum(np.bincount(bins, minlength=64), 1)
        save(self.folder / "odds.npy", odds)
        return {"documents": len(length), "kept": int(taken.sum()), "mean_characters": float(length.mean()),
                "mean_characters_kept": float(length[order[taken]].mean())}  # fmt: skip

    _spent = 0.0

    @property
    def flops(self) -> float:
        """What the other's scores of the pool cost."""
        return self._spent

    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """Odds over chance: the greatest of these are a draw by the odds."""
        odds = np.asarray(load(self.folder / "odds.npy"))
        return odds[_length_bin(_lengths(batch))] / chances(batch, self.config.seed)


def _lengths(batch: pa.RecordBatch) -> np.ndarray:
    return pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False)


def _length_bin(lengths: np.ndarray) -> np.ndarray:
    return np.minimum((2 * np.log2(np.maximum(lengths, 1))).astype(int), 63)


class ImportanceWeights(Selector):
    """log p_target - log p_pool of a document's hashed unigrams and bigrams, each a bag with one added to every bucket's count of the target's and the pool's.

    With chance, Gumbel noise is added: the greatest sums are a draw without replacement in proportion to the weights (DSIR, section 3).
    """

    config: Importance
    _ratios: np.ndarray | None = None

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """Count both."""
        assert target is not None
        counted = []
        for name, where in (("pool", pool), ("target", target)):
            counts = np.zeros(self.config.buckets)
            for batch in where.batches():
                counts += np.bincount(self._buckets(batch)[0], minlength=self.config.buckets)
            if not counts.any():
                raise UserError(f"{where.root}: no word in the {name}'s training documents, of which n-grams could be counted.")
            counted.append(counts)
        raw, wanted = ((counts + 1) / (counts + 1).sum() for counts in counted)
        save(self.folder / "log_ratios.npy", np.log(wanted) - np.log(raw))
        return {
            "ngrams": [int(counts.sum()) for counts in counted],
            "divergence_nats": float((wanted * (np.log(wanted) - np.log(raw))).sum()),
        }

    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """The log of each document's weight, with noise where chance is to decide; NaN without words."""
        if self._ratios is None:
            self._ratios = np.asarray(load(self.folder / "log_ratios.npy"))
        buckets, firsts = self._buckets(batch)
        counts = np.diff(firsts)
        scores = np.bincount(
            np.repeat(np.arange(len(counts)), counts), self._ratios[buckets], len(counts)
        )  # each document's by itself, in its order
        if self.config.per_ngram:
            scores = scores / np.maximum(counts, 1)
        if self.config.chance:
            scores = scores - np.log(-np.log(chances(batch, self.config.seed)))
        return np.where(counts > 0, scores, np.nan)

    def _buckets(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each unigram and bigram, and where each document's begin."""
        from regrowth.data_pipeline.text.characters import buffers, folds
        from regrowth.data_pipeline.text.shingles import shingle_hashes

        data, offsets = buffers(batch.column("text"))
        found = [shingle_hashes(data, offsets, folds(), n) for n in (1, 2)]
        firsts = found[0][1] + found[1][1]
        out = np.zeros(int(firsts[-1]), np.int64)
        for number, (hashes, starts) in enumerate(found):
            sizes = np.diff(starts)
            # Behind the document's unigrams stand its bigrams.
            begin = firsts[:-1] + (np.diff(found[0][1]) if number else 0)
            places = np.repeat(begin - starts[:-1], sizes) + np.arange(len(hashes))
            out[places] = (hashes % np.uint64(self.config.buckets)).astype(np.int64)
        return out, firsts
