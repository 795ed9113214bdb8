"""Whether a style's rephrases have become one template: how many share the commonest opening, and the commonest run of words (FinePhrase, arXiv 2604.13977).

What is counted is documents: of how many it is the opening, in how many it occurs.
"""

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.transforms.hashing import REPHRASED

_WORD = re.compile(r"\w+(?:[’'-]\w+)*|[^\w\s]")
OPENING, RUN = 3, 5  # words
MOST_DOCUMENTS = 20_000  # of a style that are looked at, by hash of their ids
FEWEST = 20  # of which a share says something
SUSPICIOUS = 0.2  # share of documents from which on an opening or a run looks like a template


@dataclass
class Collapse:
    """What is common in one style's documents: (words, share of documents), the commonest first."""

    style: str
    documents: int
    looked_at: int
    openings: list[tuple[str, float]]
    runs: list[tuple[str, float]]
    distinct_openings: float  # over documents looked at

    @property
    def is_suspicious(self) -> bool:
        """Whether one opening, or one run, is in a large share of documents."""
        return self.looked_at >= FEWEST and any(share > SUSPICIOUS for _, share in (*self.openings[:1], *self.runs[:1]))


def rephrased(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, str, str]]:
    """(style, id, text) of the documents that are rephrases."""
    for batch in batches:
        is_one = pc.match_substring(batch.column("source"), REPHRASED)
        some = batch.filter(is_one)
        for identity, text, meta in zip(*(some.column(name).to_pylist() for name in ("id", "text", "meta")), strict=True):
            yield json.loads(meta).get("rephrased", {}).get("style", "?"), identity, text


def collapse(documents: Iterable[tuple[str, str, str]], show: int = 5, most: int = MOST_DOCUMENTS) -> list[Collapse]:
    """The report, by style; of each style at most `most` documents are kept in memory."""
    kept: dict[str, list[tuple[int, str]]] = {}
    counts: Counter[str] = Counter()
    for style, identity, text in documents:
        counts[style] += 1
        heap = kept.setdefault(style, [])
        entry = (-xxhash.xxh3_64_intdigest(identity.encode()), text)  # those with the smallest hashes stay
        if len(heap) < most:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    return [_of(style, counts[style], [text for _, text in kept[style]], show) for style in sorted(kept)]


def _of(style: str, documents: int, texts: list[str], show: int) -> Collapse:
    words = [_WORD.findall(text.lower()) for text in texts]
    openings = Counter(" ".join(its[:OPENING]) for its in words)
    hashes = [np.unique(np.array([_hash(its[i : i + RUN]) for i in range(len(its) - RUN + 1)], np.uint64)) for its in words]
    values, often = np.unique(np.concatenate(hashes), return_counts=True) if hashes else (np.zeros(0, np.uint64), np.zeros(0, int))
    common = set(values[np.argsort(-often, kind="stable")[:show]].tolist())
    runs: Counter[str] = Counter()
    for its in words:
        runs.update({" ".join(its[i : i + RUN]) for i in range(len(its) - RUN + 1) if _hash(its[i : i + RUN]) in common})
    looked = max(1, len(texts))
    return Collapse(style, documents, len(texts), [(words, n / looked) for words, n in openings.most_common(show)],
                    [(words, n / looked) for words, n in runs.most_common(show)], len(openings) / looked)  # fmt: skip


def _hash(words: list[str]) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(words).encode("utf-8", "surrogatepass"))
