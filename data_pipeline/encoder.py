"""The encoder: the tokenizer's own, or a faster one that has proved on a sample of the corpus that it gives the same ids.

`tokenizers` is the reference. fastokens reads the same tokenizer.json and encodes about thirty times faster; it is taken only after the proof, its
ids are compared with the reference's on one document of every batch ever after, and texts that spell a special token always go to the
reference (the two treat those differently).
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.errors import RunFailed, UserError

# What makes encoders differ if anything does: clitics, runs of spaces, digits, other scripts, joined emoji, odd white space, controls.
_HARD_TEXTS = (
    "",
    " ",
    "  a   b\t\tc\n\n\n d \r\n e",
    "I'll we've DON'T it's he'd 'tis l’été",
    "0 12 345 6789 1,234.56 1e-9 ①②",
    "naïve façade Ωμέγα привет мир שלום עולם مرحبا नमस्ते สวัสดี こんにちは世界 안녕하세요",
    "👩‍👩‍👧‍👦 🇫🇷 é ﷺ \u200b\u00a0\u2003x\ufeff",
    "a\u0000b\x1b[0m \x85 \u2028",
    "x" * 3000 + " " * 500 + "=" * 700,
    "https://example.com/?q=a&b=%20#frag <a href='#'>…</a>",
)


class Encoder(Protocol):
    """Texts to token ids."""

    name: str

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Each text as [END_OF_TEXT, t1..tn]: ids uint32 [n] and document starts int64 [texts + 1]."""
        ...


class ReferenceEncoder:
    """Hugging Face `tokenizers`."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """By the tokenizer itself."""
        return self.tokenizer.encode_flat(texts)


class FastEncoder:
    """fastokens, watched."""

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer, checked: bool = True) -> None:
        import fastokens

        self.tokenizer, self.checked = tokenizer, checked
        self._backend: Any = fastokens.Tokenizer.from_file(str(tokenizer.path))
        self._special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
        self._batches = 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """By fastokens; texts that spell an added token by the reference.

        Raises:
            RunFailed: the ids of the document that was compared differ.
        """
        spelled = [row for row, text in enumerate(texts) if any(token in text for token in self._special)]
        plain = texts if not spelled else ["" if any(token in text for token in self._special) else text for text in texts]
        flat, borders = self._backend.encode_batch_flat(plain)
        ids, starts = np.frombuffer(flat, np.uint32), np.frombuffer(borders, np.uint64).astype(np.int64)
        framed, offsets = _framed(ids, starts, self.tokenizer.end_of_text)
        if spelled:
            framed, offsets = _replaced(framed, offsets, spelled, self.tokenizer.encode_documents([texts[row] for row in spelled]))
        if self.checked and texts:
            row = self._batches % len(texts)
            self._batches += 1
            if framed[offsets[row] : offsets[row + 1]].tolist() != self.tokenizer.encode_documents([texts[row]])[0]:
                raise RunFailed(f"{self.tokenizer.path}: fastokens and tokenizers disagree on a document ({texts[row][:80]!r}...). "
                                "Set data.tokenizer.engine=\"tokenizers\" and run again.")  # fmt: skip
        return framed, offsets


def _framed(ids: np.ndarray, starts: np.ndarray, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """Put the end-of-text token before each document."""
    count = len(starts) - 1
    offsets = starts + np.arange(count + 1)
    framed = np.empty(len(ids) + count, dtype=np.uint32)
    is_start = np.zeros(len(framed), dtype=bool)
    is_start[offsets[:-1]] = True
    framed[is_start] = end_of_text
    framed[~is_start] = ids
    return framed, offsets


def _replaced(ids: np.ndarray, offsets: np.ndarray, rows: list[int], documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The same documents with some exchanged."""
    pieces = [ids[a:b] for a, b in itertools.pairwise(offsets)]
    for row, tokens in zip(rows, documents, strict=True):
        pieces[row] = np.array(tokens, dtype=np.uint32)
    return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int64)


def choose_engine(tokenizer: Tokenizer, sample: Iterable[str], wanted: Literal["auto", "tokenizers", "fastokens"]) -> tuple[str, str]:
    """Which encoder to take and why: (name, reason).

    Raises:
        UserError: fastokens was asked for by name and cannot be had or gives other ids.
    """
    if wanted == "tokenizers":
        return "tokenizers", "asked for"
    try:
        fast = FastEncoder(tokenizer, checked=False)
    except ImportError:
        reason = "fastokens is not installed (pip install -e '.[curation]')"
    except Exception as error:  # it refuses tokenizers that it does not know
        reason = f"fastokens cannot load this tokenizer ({error})"
    else:
        texts = [*_HARD_TEXTS, *sample]
        ids, offsets = fast.encode(texts)
        expected, borders = tokenizer.encode_flat(texts)
        if np.array_equal(ids, expected) and np.array_equal(offsets, borders):
            return "fastokens", f"identical ids on {len(texts):,} texts, {int(borders[-1]):,} tokens"
        differs = next(
            k for k in range(len(texts)) if ids[offsets[k] : offsets[k + 1]].tolist() != expected[borders[k] : borders[k + 1]].tolist()
        )
        reason = f"fastokens gives other ids on {texts[differs][:60]!r}"
    if wanted == "fastokens":
        raise UserError(f'data.tokenizer.engine = "fastokens": {reason}. Use "auto" or "tokenizers".')
    return "tokenizers", reason


def build_encoder(tokenizer: Tokenizer, name: str) -> Encoder:
    """The encoder of that name."""
    return FastEncoder(tokenizer) if name == "fastokens" else ReferenceEncoder(tokenizer)


def engine_file(folder: Path) -> Path:
    """Where a corpus says which encoder it chose."""
    return folder / "tokenizer" / "engine.json"
