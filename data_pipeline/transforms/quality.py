"""The first filter: is this readable text at all?

Rules for prose (Gopher, C4, FineWeb) would drop source code and mathematics; these ones hold for any text. Each is one Arrow expression
over the batch.
"""

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.transform_config import Quality
from regrowth.data_pipeline.transforms.base import Filter, Verdict


class QualityFilter(Filter):
    """Drops with one of: too_short, too_long, not_utf8, long_line, few_letters, repeated_lines."""

    name = "quality"

    def __init__(self, config: Quality) -> None:
        self.config = config

    def judge(self, texts: pa.LargeStringArray) -> Verdict:
        """The verdicts of a batch; a document that fails several rules is counted under the first."""
        c = self.config
        verdict = Verdict.keep_all(len(texts))
        characters = _numpy(pc.utf8_length(texts))
        verdict.drop(characters < c.min_characters, "too_short")
        verdict.drop(characters > c.max_characters, "too_long")
        sized = np.maximum(characters, 1)
        verdict.drop(_numpy(pc.count_substring(texts, "�")) / sized > c.max_replacement_fraction, "not_utf8")

        # Only what is still kept is looked at line by line: a 50 MB single line has been settled by its length.
        kept = np.flatnonzero(verdict.keep)
        if len(kept):
            rest = texts.take(pa.array(kept))
            longest, duplicate = _line_statistics(rest)
            letters = _numpy(pc.count_substring_regex(rest, pattern=r"\pL")) / sized[kept]
            verdict.drop(_at(kept, longest > c.max_line_characters, len(texts)), "long_line")
            verdict.drop(_at(kept, letters < c.min_alphabetic_fraction, len(texts)), "few_letters")
            verdict.drop(_at(kept, duplicate > c.max_duplicate_line_fraction, len(texts)), "repeated_lines")
        return verdict


def _numpy(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)


def _at(indices: np.ndarray, where: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[indices[where]] = True
    return mask


def _line_statistics(texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Per document: characters of its longest line, and the fraction of its non-blank lines that repeat an earlier one."""
    lines = pc.split_pattern(texts, "\n")
    document = _numpy(pc.list_parent_indices(lines))
    flat = pc.utf8_trim_whitespace(pc.list_flatten(lines))
    lengths = _numpy(pc.utf8_length(flat)).astype(np.int64)
    longest = np.zeros(len(texts), dtype=np.int64)
    np.maximum.at(longest, document, lengths)
    spoken = lengths > 0
    total = np.bincount(document[spoken], minlength=len(texts))
    codes = _numpy(pc.dictionary_encode(flat).indices)[spoken].astype(np.int64)
    distinct = np.unique(document[spoken].astype(np.int64) << 32 | codes) >> 32
    repeated = total - np.bincount(distinct, minlength=len(texts))
    return longest, repeated / np.maximum(total, 1)
