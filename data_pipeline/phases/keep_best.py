"""Keep the documents with the highest scores, up to a share of all text or a number of each group's documents.

A global transform: map -> reduce -> apply. The map is done in curation (`score_keys` of each document beside its part), the reduce finds for each group the key of the last
document that stays, by a radix selection that reads the keys six times and holds no more than a histogram; readers of the parts compare. So the cut is exact whatever
the size of the corpus, and what is kept depends neither on the order of the documents nor on who did the work: equal scores are ordered by a hash of the text and, for copies, the id.
"""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.phases.base import Phase
from regrowth.data_pipeline.phases.curate import Parts, load, save
from regrowth.data_pipeline.transform_config import KeepBest
from regrowth.data_pipeline.transforms.base import score_of
from regrowth.errors import UserError

if TYPE_CHECKING:
    from regrowth.data_pipeline.pipeline import Pipeline

# One row a document: the group it competes in, its score as an unsigned number of the same order (0: it has none), what orders equal scores, what it weighs.
KEYS = np.dtype([("group", "<u8"), ("score", "<u4"), ("tie", "<u8"), ("weight", "<i8")])
# The last document that stays of each group: what is greater or equal in (score, tie) stays.
LINE = np.dtype([("group", "<u8"), ("score", "<u4"), ("tie", "<u8")])
_COPIES = np.uint64((1 << 24) - 1)  # bits of a tie that part copies of a text
_DIGITS = 6  # of 16 bits each, in (score, tie)
_ROWS = 1 << 20  # documents looked at at once
_GROUPED_DOCUMENTS = 1 << 23  # of a task, where groups are many


def ordered(scores: np.ndarray) -> np.ndarray:
    """uint32: float32 scores as numbers of the same order, from 1; 0 for NaN."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0
    up = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return np.where(np.isnan(scores), np.uint32(0), up)


def unordered(keys: np.ndarray) -> np.ndarray:
    """The float32 scores of `ordered`."""
    bits = np.where(keys >> 31, keys & np.uint32((1 << 31) - 1), ~keys)
    return np.where(keys == 0, np.float32(np.nan), bits.astype(np.uint32).view(np.float32))


def host_of(meta: str, domain: str) -> str:
    """The web host that a document came from, or, where its source named none, its domain."""
    url = json.loads(meta or "{}").get("url")
    try:
        return (urlsplit(url).hostname if isinstance(url, str) else None) or domain
    except ValueError:
        return domain


def groups_of(batch: pa.RecordBatch, per: str) -> list[str]:
    """The name of the group that each document is in; "" where all are in one."""
    if per == "corpus":
        return [""] * len(batch)
    domains = batch.column("domain").to_pylist()
    if per == "domain":
        return domains
    return [host_of(meta, domain) for meta, domain in zip(batch.column("meta").to_pylist(), domains, strict=True)]


def score_keys(batch: pa.RecordBatch, hashes: np.ndarray, config: KeepBest, count_tokens: Callable[[str], int]) -> np.ndarray:
    """`KEYS` of a batch; `hashes` are the content hashes (V16)."""
    out = np.zeros(len(batch), KEYS)
    names = groups_of(batch, config.per)
    known = {name: xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) for name in set(names)}
    out["group"] = [known[name] for name in names]
    scores = score_of(batch.column("scores"), config.score, np.nan)
    out["score"] = 1 if config.score == "random" and np.isnan(scores).all() else ordered(scores)
    # By content; copies of a text, which differ in their ids alone, by those.
    ids = np.array([xxhash.xxh3_64_intdigest(identity.encode()) for identity in batch.column("id").to_pylist()], np.uint64)
    content = tie_of(hashes.view("<u8").reshape(-1, 2)[:, 1], config.seed)
    out["tie"] = content & ~_COPIES | ids & _COPIES
    if config.documents is not None or config.of == "documents":
        out["weight"] = 1
    elif config.of == "tokens":
        out["weight"] = [count_tokens(text) for text in batch.column("text").to_pylist()]
    else:
        out["weight"] = pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False)
    return out


def tie_of(values: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of each value and a seed: another seed orders equal scores in another way."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * seed + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _digit(rows: np.ndarray, place: int) -> np.ndarray:
    value, from_top = (rows["score"], place) if place < 2 else (rows["tie"], place - 2)
    width = 32 if place < 2 else 64
    return (value >> value.dtype.type(width - 16 * (from_top + 1))).astype(np.int64) & 0xFFFF


def find_lines(read: Callable[[], Iterator[np.ndarray]], config: KeepBest) -> tuple[np.ndarray, dict[str, Any]]:
    """`LINE` of each group, sorted by group, and what is told of them.

    The best documents are kept until they weigh what is asked, the one that passes the line among them.

    Args:
        read: the `KEYS` of all documents, again each time it is called, in pieces.
    """
    groups, all_weights, counts, scored = _totals(read)
    chosen = np.ones(len(groups), dtype=bool)
    if config.groups is not None and config.groups < len(groups):
        chosen[np.lexsort((groups, -counts))[config.groups :]] = False
    if config.documents is not None:
        wanted = np.full(len(groups), float(config.documents))
    else:
        assert config.fraction is not None
        wanted = np.ceil(config.fraction * all_weights.astype(np.float64) - 1e-9)
    # Where less is scored than wanted, all that is scored stays: the line is below everything.
    open_ = chosen & (wanted > 0) & (scored > wanted)
    lines = np.zeros(len(groups), LINE)
    lines["group"] = groups
    lines["score"] = 1
    lines["score"][~chosen | (wanted <= 0)] = np.uint32(0xFFFFFFFF)  # above everything: no finite score is so high
    lines["tie"][~chosen | (wanted <= 0)] = np.uint64(2**64 - 1)
    _descend(read, groups, open_, wanted, lines)
    finite = unordered(lines["score"][open_])
    told = {
        "groups": len(groups),
        "documents": int(counts.sum()),
        "weight": int(all_weights.sum()),
        "lowest_kept": float(finite.min()) if len(finite) and config.score != "random" else None,
    }
    return lines, told


def _totals(read: Callable[[], Iterator[np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The groups, sorted; of each the weight of its documents, their number, and the weight of those with a score."""
    groups, sums = np.zeros(0, np.uint64), np.zeros((3, 0), np.int64)
    for rows in read():
        here, place = np.unique(rows["group"], return_inverse=True)
        some = np.zeros((3, len(here)), np.int64)
        for number, values in enumerate((rows["weight"], np.ones(len(rows), np.int64), np.where(rows["score"] > 0, rows["weight"], 0))):
            np.add.at(some[number], place, values)
        groups, place = np.unique(np.concatenate([groups, here]), return_inverse=True)
        joined = np.zeros((3, len(groups)), np.int64)
        np.add.at(joined.T, place, np.concatenate([sums, some], axis=1).T)
        sums = joined
    return groups, sums[0], sums[1], sums[2]


def _descend(
    read: Callable[[], Iterator[np.ndarray]], groups: np.ndarray, open_: np.ndarray, wanted: np.ndarray, lines: np.ndarray
) -> None:
    """Find the lines of the open groups, 16 bits at a time from the top: a histogram of the weights of what agrees so far, read from its upper end."""
    left = wanted.copy()
    for place in range(_DIGITS):
        if not open_.any():
            return
        keys, sums = np.zeros(0, np.int64), np.zeros(0, np.float64)
        for rows in read():
            of = np.searchsorted(groups, rows["group"])
            use = open_[of] & (rows["score"] > 0)
            for above in range(place):
                use &= _digit(rows, above) == _digit(lines[of], above)
            here, inverse = np.unique((of[use] << 16) | _digit(rows[use], place), return_inverse=True)
            some = np.bincount(inverse, rows["weight"][use], len(here))
            keys, inverse = np.unique(np.concatenate([keys, here]), return_inverse=True)
            sums = np.bincount(inverse, np.concatenate([sums, some]), len(keys))
        # From the upper end of each group's histogram to where what is left is reached.
        order = np.lexsort((-(keys & 0xFFFF), keys >> 16))
        keys, sums = keys[order], sums[order]
        of = keys >> 16
        first = np.searchsorted(of, np.arange(len(groups)))
        total = np.cumsum(sums)
        before = np.concatenate([[0.0], total])[first]
        reached = total - before[of] >= left[of]
        if place == 0:
            lines["score"][open_] = 0
        enough = np.flatnonzero(reached)
        group, firsts_of = np.unique(of[enough], return_index=True)
        at = enough[firsts_of]
        left[group] -= total[at] - sums[at] - before[group]
        field, shift = ("score", 16 * (1 - place)) if place < 2 else ("tie", 16 * (5 - place))
        digits = (keys[at] & 0xFFFF).astype(lines[field].dtype)
        lines[field][group] |= digits << lines[field].dtype.type(shift)


class KeepBestPhase(Phase):
    """The lines of all groups. One task; where groups are hosts, and all of them count, one for every 8 million documents."""

    kind = "keep_best"

    def __init__(self, pipeline: "Pipeline", number: int, parts: Parts, config: KeepBest, place: int) -> None:
        super().__init__(pipeline, number)
        self.parts, self.config, self.suffix = parts, config, f".best{place}.npy"
        self.removals = Selection(self)

    def sizes(self) -> list[int]:
        """Of the keys that each task reads."""
        documents = sum(self.parts.phase.summary["documents"])
        tasks = max(1, -(-documents // _GROUPED_DOCUMENTS)) if self.config.per == "host" and self.config.groups is None else 1
        return [KEYS.itemsize * documents // tasks] * tasks

    def run(self, task: int) -> dict[str, Any]:
        """Find the lines of one task's groups.

        Raises:
            UserError: no document has the score.
        """
        tasks = len(self.task_sizes)

        def read() -> Iterator[np.ndarray]:
            for part in self.parts.present():
                keys = load(self.parts.phase.path(part, self.suffix))
                kept = self.parts.kept_rows(part, len(keys))
                for begin in range(0, len(keys), _ROWS):
                    rows = np.array(keys[begin : begin + _ROWS])[kept[begin : begin + _ROWS]]
                    yield rows[rows["group"] % np.uint64(tasks) == task] if tasks > 1 else rows

        if tasks == 1 and not any((rows["score"] > 0).any() for rows in read()) and any(len(rows) for rows in read()):
            raise UserError(f"data.transforms: keep_best: score = {self.config.score}: no document has this score. It is given by a transform before it "
                            "(selector, fasttext, language, strength); name that, or see why it gives none.")  # fmt: skip
        lines, told = find_lines(read, self.config)
        save(self.path(task, ".lines.npy"), lines)
        return told


class Selection:
    """Which documents of a segment are not among the best; stands among the removals of deduplications."""

    name, reason = "keep_best", "not_best"

    def __init__(self, phase: KeepBestPhase) -> None:
        self.phase = phase

    @cached_property
    def _lines(self) -> np.ndarray:
        lines = np.concatenate([load(self.phase.path(task, ".lines.npy")) for task in range(len(self.phase.task_sizes))])
        return lines[np.argsort(lines["group"])]

    def keys(self, part: int) -> np.ndarray:
        """`KEYS` of all documents of a part."""
        return load(self.phase.parts.phase.path(part, self.phase.suffix))

    def rows(self, part: int) -> np.ndarray:
        """Rows of a part that are removed, sorted, without those that an earlier removal took."""
        keys = self.keys(part)
        gone = self.phase.parts.kept_rows(part, len(keys))
        for begin in range(0, len(keys), _ROWS):
            gone[begin : begin + _ROWS] &= ~self._stays(np.array(keys[begin : begin + _ROWS]))
        return np.flatnonzero(gone)

    def _stays(self, keys: np.ndarray) -> np.ndarray:
        if not len(self._lines):
            return np.ones(len(keys), dtype=bool)
        place = np.minimum(np.searchsorted(self._lines["group"], keys["group"]), len(self._lines) - 1)
        line = self._lines[place]  # a group without a line had all its documents removed before
        above = (keys["score"] > line["score"]) | ((keys["score"] == line["score"]) & (keys["tie"] >= line["tie"]))
        return above & (keys["score"] > 0) & (line["group"] == keys["group"])

    def line_of(self, part: int, row: int) -> tuple[float, float, bool]:
        """A document's score, the lowest that stays in its group, and whether it stays."""
        key = np.array(self.keys(part)[row : row + 1])
        line = self._lines[np.minimum(np.searchsorted(self._lines["group"], key["group"]), len(self._lines) - 1)]
        return float(unordered(key["score"])[0]), float(unordered(line["score"])[0]), bool(self._stays(key)[0])
