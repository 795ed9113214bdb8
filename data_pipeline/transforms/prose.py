"""The published rules for prose: Gopher's quality and repetition rules, C4's, FineWeb's. Thresholds are applied to counts made in one pass.

The first failing rule names the reason, in the order in which the rules are usually applied.
"""

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.text import statistics
from regrowth.data_pipeline.text.characters import buffers, character_classes
from regrowth.data_pipeline.text.words import abbreviations, word_hashes
from regrowth.data_pipeline.transform_config import C4, FineWeb, GopherQuality, GopherRepetition
from regrowth.data_pipeline.transforms.base import Filter, Verdict, part, replaced


class GopherQualityFilter(Filter):
    """Drops with one of: too_few_words, too_many_words, short_words, long_words, hashes, ellipses, bullet_lines, ellipsis_lines,
    few_letters, few_stop_words.
    """

    name = "gopher_quality"

    def __init__(self, config: GopherQuality) -> None:
        self.config = config
        self.stop_words = np.array([word_hashes([word])[0] for word in config.stop_words], dtype=np.uint64)

    def judge(self, texts: pa.LargeStringArray) -> Verdict:
        """The verdicts of a batch."""
        c, s, verdict = self.config, statistics, Verdict.keep_all(len(texts))
        counts = s.prose_counts(*buffers(texts), character_classes(), abbreviations(), self.stop_words)
        spoken, words, count_lines = counts[:, s.NON_SYMBOL], np.maximum(counts[:, s.WORDS], 1), np.maximum(counts[:, s.LINES], 1)
        mean_length = counts[:, s.NON_SYMBOL_CHARACTERS] / np.maximum(spoken, 1)
        verdict.drop(spoken < c.min_words, "too_few_words")
        verdict.drop(spoken > c.max_words, "too_many_words")
        verdict.drop(mean_length < c.min_mean_word_length, "short_words")
        verdict.drop(mean_length > c.max_mean_word_length, "long_words")
        verdict.drop(counts[:, s.HASHES] / words > c.max_symbol_ratio, "hashes")
        verdict.drop(counts[:, s.ELLIPSES] / words > c.max_symbol_ratio, "ellipses")
        verdict.drop(counts[:, s.BULLETS] / count_lines > c.max_bullet_lines, "bullet_lines")
        verdict.drop(counts[:, s.ELLIPSIS_LINES] / count_lines > c.max_ellipsis_lines, "ellipsis_lines")
        verdict.drop(counts[:, s.LETTER_WORDS] / words < c.min_letter_words, "few_letters")
        verdict.drop(counts[:, s.STOP_WORDS] < c.min_stop_words, "few_stop_words")
        return verdict


class GopherRepetitionFilter(Filter):
    """Drops with one of: empty, repeated_paragraphs, repeated_paragraph_characters, repeated_lines, repeated_line_characters,
    top_N_gram, repeated_N_grams.
    """

    name = "gopher_repetition"

    def __init__(self, config: GopherRepetition) -> None:
        self.config = config
        self.top, self.repeated = sorted(config.top_ngrams.items()), sorted(config.repeated_ngrams.items())

    def judge(self, texts: pa.LargeStringArray) -> Verdict:
        """The verdicts of a batch."""
        c, verdict = self.config, Verdict.keep_all(len(texts))
        top, repeated = (np.array([n for n, _ in pairs], dtype=np.int64) for pairs in (self.top, self.repeated))
        counts = statistics.repetition_counts(*buffers(texts), character_classes(), abbreviations(), top, repeated)
        characters = np.maximum(counts[:, 0], 1)
        verdict.drop(counts[:, 0] == 0, "empty")
        verdict.drop(counts[:, 2] / np.maximum(counts[:, 1], 1) > c.max_repeated_paragraphs, "repeated_paragraphs")
        verdict.drop(counts[:, 3] / characters > c.max_repeated_paragraph_characters, "repeated_paragraph_characters")
        verdict.drop(counts[:, 5] / np.maximum(counts[:, 4], 1) > c.max_repeated_lines, "repeated_lines")
        verdict.drop(counts[:, 6] / characters > c.max_repeated_line_characters, "repeated_line_characters")
        for column, (n, limit) in enumerate(self.top, start=7):
            verdict.drop(counts[:, column] / characters > limit, f"top_{n}_gram")
        for column, (n, limit) in enumerate(self.repeated, start=7 + len(self.top)):
            verdict.drop(counts[:, column] / characters > limit, f"repeated_{n}_grams")
        return verdict


class FineWebFilter(Filter):
    """Drops with one of: empty, few_terminal_lines, short_lines, repeated_line_characters, many_newlines."""

    name = "fineweb"

    def __init__(self, config: FineWeb) -> None:
        self.config = config

    def judge(self, texts: pa.LargeStringArray) -> Verdict:
        """The verdicts of a batch."""
        c, s, verdict = self.config, statistics, Verdict.keep_all(len(texts))
        counts = s.line_counts(*buffers(texts), character_classes(), abbreviations(), c.short_line_characters)
        spoken = np.maximum(counts[:, s.SPOKEN_LINES], 1)
        visible = np.maximum(counts[:, s.TEXT_CHARACTERS] - counts[:, s.NEWLINES], 1)
        verdict.drop(counts[:, s.SPOKEN_LINES] == 0, "empty")
        verdict.drop(counts[:, s.TERMINAL_LINES] / spoken < c.min_terminal_lines, "few_terminal_lines")
        verdict.drop(counts[:, s.SHORT_LINES] / spoken > c.max_short_lines, "short_lines")
        verdict.drop(counts[:, s.REPEATED_LINE_CHARACTERS] / visible > c.max_repeated_line_characters, "repeated_line_characters")
        verdict.drop(counts[:, s.NEWLINES] / np.maximum(counts[:, s.TEXT_WORDS], 1) > c.max_newlines_per_word, "many_newlines")
        return verdict


class C4Rules(Filter):
    """Removes lines, then drops pages with one of: lorem_ipsum, curly_bracket, too_few_sentences."""

    name = "c4"
    _REASONS = np.array(["", "lorem_ipsum", "curly_bracket", "too_few_sentences"], dtype=object)
    _LINES = ("long_word", "no_terminal_mark", "too_few_words", "phrase")

    def __init__(self, config: C4) -> None:
        self.config = config
        self.phrases = _packed(["lorem ipsum", *(phrase.lower() for phrase in config.line_phrases)])
        self.citations = _packed(["edit]", "citation needed]"])

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        c = self.config
        flags = np.array([c.terminal_punctuation, c.drop_lorem_ipsum, c.drop_curly_brackets, c.remove_citations])
        data, offsets, fate, dropped = statistics.c4_lines(
            *buffers(batch.column("text")), character_classes(), abbreviations(), *self.phrases, *self.citations,
            c.min_words_per_line, c.max_word_characters, c.min_sentences, flags)  # fmt: skip
        for name, count in zip(self._LINES, dropped.sum(axis=0).tolist(), strict=True):
            self.counts[f"lines: {name}"] += count
        kept, gone = part(batch, Verdict(self._REASONS[fate]), self.name, self.level)
        texts = text_array(data, offsets)
        return replaced(kept, texts.filter(pa.array(fate == statistics.KEPT)), f"{self.name}@{self.version}", self.level), gone


def text_array(data: np.ndarray, offsets: np.ndarray) -> pa.LargeStringArray:
    """Bytes and offsets as an Arrow text array."""
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data)))


def _packed(phrases: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [phrase.encode() for phrase in phrases]
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum([0, *(len(e) for e in encoded)])
