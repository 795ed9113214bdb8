"""Byte-level BPE: trained on the curated text, loaded with its hash and its table of bytes per token.

One special token, END_OF_TEXT, is document start and document end at once. The rule for document borders, for everything that reads
tokens: a document of text tokens t1..tn is stored as [END_OF_TEXT, t1..tn] and its labels are [t1..tn, END_OF_TEXT]; so its first token is
predicted too, nothing is predicted across documents, and no position is wasted. END_OF_TEXT counts zero bytes in bits per byte.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from regrowth.errors import UserError
from regrowth.files import atomic_path, sha256_of

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json with what training needs to know of it."""

    path: Path
    backend: Any  # tokenizers.Tokenizer
    hash: str  # sha256 of the file

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a tokenizer.json.

        Raises:
            UserError: it is missing, damaged, not byte-level, or has no end-of-text token.
        """
        import tokenizers

        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise UserError(f"{path}: there is no tokenizer here. Give the path of a tokenizer.json.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer that `tokenizers` can load ({error}).") from error
        backend.encode_special_tokens = True  # a document that spells END_OF_TEXT is text, not a border
        loaded = cls(path, backend, sha256_of(path))
        if backend.token_to_id(END_OF_TEXT) is None:
            raise UserError(f"{path}: the tokenizer has no {END_OF_TEXT} token, which separates documents; add it as a special token.")
        return loaded

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size()

    @property
    def end_of_text(self) -> int:
        """The id that starts and ends documents."""
        return self.backend.token_to_id(END_OF_TEXT)

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Each text as [END_OF_TEXT, t1..tn]; text that spells a special token is encoded as text."""
        start = [self.end_of_text]
        return [start + encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same as one array: ids (uint32 [n]) and where each document starts (int64 [texts + 1])."""
        encoded = self.encode_documents(texts)
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.uint32, count=int(offsets[-1])), offsets

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.backend.decode(ids)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes each id stands for; empty for special tokens."""
        alphabet = _byte_alphabet()
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        pieces = [b""] * self.size
        for token, index in self.backend.get_vocab().items():
            if token not in special:
                try:
                    pieces[index] = bytes(alphabet[character] for character in token)
                except KeyError as error:
                    raise UserError(
                        f"{self.path}: token {token!r} is not byte-level; only byte-level BPE gives exact bits per byte."
                    ) from error
        return pieces

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """int32 [size]: how many bytes of text each id stands for."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int32)


def train_tokenizer(texts: Iterator[str], vocabulary: int, out: Path) -> Tokenizer:
    """Train a byte-level BPE of `vocabulary` ids (256 bytes and END_OF_TEXT among them) and write `out`/tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=32,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "tokenizer.json") as partial:
        backend.save(str(partial))
    with atomic_path(out / "bytes_per_token.npy") as partial, partial.open("wb") as file:
        np.save(file, Tokenizer.load(out).bytes_per_token, allow_pickle=False)
    return Tokenizer.load(out)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 as itself, the others from U+0100 on in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
