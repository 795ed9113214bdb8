"""Filters that ask something outside the text's form: its language, its address, a word list, the evaluation sets."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.sources.base import read_lines
from regrowth.data_pipeline.sources.files import JSONL
from regrowth.data_pipeline.sources.paths import find_files, open_packed
from regrowth.data_pipeline.transform_config import BlockedWords, Decontaminate, Language, UrlFilter
from regrowth.data_pipeline.transforms.base import Filter, Verdict, append_score, part, with_columns
from regrowth.data_pipeline.transforms.fasttext_score import load_fasttext
from regrowth.errors import UserError, need

_LANGUAGE_CHARACTERS = 4000  # a language shows in the first pages


class LanguageFilter(Filter):
    """Names each document's language in `meta.language`, with its score; drops with: language_XX, unsure_language."""

    name = "language"

    def __init__(self, config: Language) -> None:
        self.config = config
        if config.model:
            self._fasttext = load_fasttext(config.model, "data.transforms.model")
        else:
            module = need("py3langid.langid", "language identification without a model of your own")
            self._langid: Any = module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)

    def identify(self, texts: list[str]) -> list[tuple[str, float]]:
        """(code, probability) of each text, judged by its beginning."""
        begins = [text[:_LANGUAGE_CHARACTERS] for text in texts]
        if self.config.model:
            labels, scores = self._fasttext.predict([" ".join(text.split()) or " " for text in begins])
            return [
                (label[0].removeprefix("__label__"), float(score[0])) if len(label) else ("", 0.0)
                for label, score in zip(labels, scores, strict=True)
            ]
        return [(code, float(score)) for code, score in map(self._langid.classify, begins)]

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        found = self.identify(batch.column("text").to_pylist())
        meta = [
            json.dumps({**json.loads(m), "language": code}) for m, (code, _) in zip(batch.column("meta").to_pylist(), found, strict=True)
        ]
        scores = np.array([score for _, score in found], dtype=np.float32)
        verdict = Verdict.keep_all(len(batch))
        verdict.reasons[:] = ["" if code in self.config.keep else f"language_{code}" for code, _ in found]
        verdict.drop(scores < self.config.min_score, "unsure_language")
        named = with_columns(batch, meta=pa.array(meta, pa.string()), scores=append_score(batch.column("scores"), "language", scores))
        return part(named, verdict, self.name, self.level)


def read_list(path: str, key: str) -> list[str]:
    """The entries of a list file, one a line; "#" begins a comment line.

    Raises:
        UserError: it cannot be read or is empty.
    """
    try:
        rows = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key} = {path}: cannot be read as a list, one entry a line ({error}).") from error
    if not (entries := [row for row in rows if row and not row.startswith("#")]):
        raise UserError(f"{key} = {path}: holds no entry.")
    return entries


class UrlRules(Filter):
    """Drops by `meta.url` with one of: no_url, blocked_domain, blocked_url, blocked_word."""

    name = "url"

    def __init__(self, config: UrlFilter) -> None:
        self.config = config
        lists = {key: set(map(str.lower, read_list(path, f"data.transforms.{key}"))) if (path := getattr(config, key)) else set()
                 for key in ("domains", "urls", "words")}  # fmt: skip
        self.domains, self.urls = lists["domains"], {_bare(url) for url in lists["urls"]}
        self.words = (
            re.compile("|".join(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])" for word in sorted(lists["words"])))
            if lists["words"]
            else None
        )

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        reasons = [self.reason(json.loads(meta).get("url")) for meta in batch.column("meta").to_pylist()]
        return part(batch, Verdict(np.array(reasons, dtype=object)), self.name, self.level)

    def reason(self, url: Any) -> str:
        """Why this address is not wanted; empty if it is."""
        if not isinstance(url, str) or not url:
            return "no_url" if self.config.require_url else ""
        url = url.lower()
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = ""
        names = host.split(".")
        if self.domains and any(".".join(names[k:]) in self.domains for k in range(len(names))):
            return "blocked_domain"
        if self.urls and _bare(url) in self.urls:
            return "blocked_url"
        return "blocked_word" if self.words and self.words.search(url) else ""


def _bare(url: str) -> str:
    return url.lower().split("://", 1)[-1].removeprefix("www.").rstrip("/")


class BlockedWordsFilter(Filter):
    """Drops with: blocked_words. Between letters nothing matches, except in scripts written without spaces."""

    name = "blocked_words"

    def __init__(self, config: BlockedWords) -> None:
        self.config = config
        words = read_list(config.path, "data.transforms.path")
        spaced = [re.escape(w.lower()) for w in words if not _unspaced(w)]
        joined = [re.escape(w) for w in words if _unspaced(w)]
        self.pattern = "|".join(([rf"(?:^|[^\pL\pN])(?:{'|'.join(spaced)})(?:$|[^\pL\pN])"] if spaced else []) + joined)

    def judge(self, texts: pa.LargeStringArray) -> Verdict:
        """The verdicts of a batch."""
        verdict = Verdict.keep_all(len(texts))
        found = pc.count_substring_regex(pc.utf8_lower(texts), self.pattern).to_numpy(zero_copy_only=False)
        verdict.drop(found > self.config.max_occurrences, "blocked_words")
        return verdict


def _unspaced(word: str) -> bool:
    return any("\u0e00" <= c <= "\u0eff" or "\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" for c in word)


class Decontaminator(Filter):
    """Drops with: overlap; `meta.overlap` names the evaluation item. `counts` sums documents by evaluation file; `unchecked` items are too short."""

    name = "decontaminate"

    def __init__(self, config: Decontaminate) -> None:
        from regrowth.data_pipeline.text.characters import buffers, folds
        from regrowth.data_pipeline.text.shingles import build_table, word_counts

        self.config = config
        self.items, texts = _evaluation_texts(config)
        array = pa.array(texts, pa.large_string())
        words = word_counts(*buffers(array), folds())
        size = 1 << max(4, int(2 * max(int(words.sum()), 1) - 1).bit_length())
        self.table, owners, lengths, self.present = build_table(*buffers(array), folds(), config.words, config.shortest, size)
        self.owners, self.lengths = owners, np.flatnonzero(lengths)
        self.unchecked = int((words < config.shortest).sum())
        if self.unchecked:
            self.note = (
                f"{self.unchecked:,} of {len(texts):,} evaluation texts have fewer than {config.shortest} words and are not looked for"
            )

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        from regrowth.data_pipeline.text.characters import buffers, folds
        from regrowth.data_pipeline.text.shingles import overlaps

        shared, owner = overlaps(*buffers(batch.column("text")), folds(), self.lengths, self.table, self.owners, self.present)
        hit = shared > self.config.max_shared
        verdict = Verdict.keep_all(len(batch))
        verdict.drop(hit, "overlap")
        if hit.any():
            meta = batch.column("meta").to_pylist()
            for row in np.flatnonzero(hit):
                file, item = self.items[owner[row]]
                self.counts[f"documents that hold {file}"] += 1
                meta[row] = json.dumps({**json.loads(meta[row]), "overlap": {"file": file, "item": item, "ngrams": int(shared[row])}})
            batch = with_columns(batch, meta=pa.array(meta, pa.string()))
        return part(batch, verdict, self.name, self.level)


@contextmanager
def _whole(path: str) -> Iterator[None]:
    """An evaluation set must be whole, or what it holds is not looked for."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); what is missing would not be looked for.") from error


def _evaluation_texts(config: Decontaminate) -> tuple[list[tuple[str, str]], list[str]]:
    """(file, place) of each text to look for, and the texts: every configured field of every item."""
    owners: list[tuple[str, str]] = []
    texts: list[str] = []
    for found in find_files(config.path, JSONL, "data.transforms.path"):
        path = found.path
        with _whole(path), open_packed(path) as stream:
            for offset, line in read_lines(stream, 1 << 28):
                if line is not None and not line.strip():
                    continue
                try:
                    row = json.loads(line or b"")
                except ValueError as error:
                    raise UserError(
                        f"{path}@{offset}: not JSON ({error}); an evaluation set must be whole, or what it holds is not looked for."
                    ) from error
                for field in config.fields:
                    values = row.get(field) if isinstance(row, dict) else None
                    for value in values if isinstance(values, list) else [values]:
                        if isinstance(value, str) and value.strip():
                            owners.append((Path(path).name, f"{offset}/{field}"))
                            texts.append(value)
    if not texts:
        raise UserError(f"data.transforms.path = {config.path}: no item has any of the fields {', '.join(config.fields)}; set `fields`.")
    return owners, texts
