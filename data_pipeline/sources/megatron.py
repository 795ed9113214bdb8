"""Megatron-LM's indexed datasets, read and written: token ids in `.bin`, their borders in `.idx`.

Layout of `.idx` (little endian): magic "MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), sequences (u64), document borders (u64), then the
lengths (i32) and byte positions (i64) of the sequences and the borders of documents (i64, in sequences). A document ends with the
end-of-text token there; here it begins with it, and the two are turned into each other.
"""

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import MegatronSource
from regrowth.data_pipeline.sources.base import Item, item_of
from regrowth.data_pipeline.sources.paths import Found, find_files
from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.errors import UserError
from regrowth.files import atomic_path

_MAGIC = b"MMIDIDX\x00\x00"
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")


@dataclass(frozen=True)
class IndexedDataset:
    """A `.bin`/`.idx` pair, memory-mapped."""

    tokens: np.ndarray  # all ids, in file order
    borders: np.ndarray  # int64 [documents + 1], in tokens

    @classmethod
    def open(cls, path: Path) -> "IndexedDataset":
        """Open by either file or by their common prefix.

        Raises:
            UserError: a file is missing, damaged, or of another format.
        """
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        idx, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            index = idx.read_bytes()
            magic, version, code, sequences, borders = _HEADER.unpack_from(index)
            if magic != _MAGIC or version != 1 or code not in _TYPES:
                raise ValueError("its first bytes are not those of an indexed dataset with whole-number tokens")
            at = _HEADER.size
            lengths = np.frombuffer(index, np.int32, sequences, at)
            documents = np.frombuffer(index, np.int64, borders, at + 12 * sequences)
            ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            tokens = np.memmap(binary, _TYPES[code], "r") if binary.stat().st_size else np.zeros(0, _TYPES[code])
            if not len(documents) or documents[0] < 0 or documents[-1] > sequences or (np.diff(documents) < 0).any() or (lengths < 0).any():
                raise ValueError("the borders of its documents are not ascending numbers of sequences")
            if len(tokens) < ends[-1]:
                raise ValueError(f"{binary.name} has {len(tokens):,} tokens where the index counts {ends[-1]:,}")
        except (OSError, ValueError, OverflowError, IndexError, struct.error) as error:
            raise UserError(f"{idx}: not readable as Megatron's indexed dataset: {error}.") from error
        return cls(tokens, ends[documents])


class MegatronFiles:
    """Documents of indexed datasets, decoded to text."""

    def __init__(self, config: MegatronSource) -> None:
        self.config = config

    def items(self, target_bytes: int) -> list[Item]:
        """Runs of documents of about `target_bytes` each."""
        path = Path(self.config.path)
        found = find_files(str(path if path.exists() else f"{path}.idx"), (".idx",), "data.sources.path")
        return [item for file in found for item in self._runs(file, target_bytes)]

    def _runs(self, file: Found, target_bytes: int) -> list[Item]:
        data = IndexedDataset.open(Path(file.path))
        width, count = data.tokens.itemsize, len(data.borders) - 1
        runs = max(1, min(count, round(len(data.tokens) * width / target_bytes)))
        at = [count * k // runs for k in range(runs + 1)]
        stat = Path(file.path).with_suffix(".bin").stat()
        both = Found(file.path, file.size, f"{file.stamp},{stat.st_size},{stat.st_mtime_ns}")
        return [item_of(both, piece=(a, b), size=int(data.borders[b] - data.borders[a]) * width) for a, b in itertools.pairwise(at)]

    def read(self, item: Item) -> Iterator[Raw]:
        """The documents of the item's run, without the end-of-text token."""
        path = Path(item.paths[0])
        data, tokenizer = IndexedDataset.open(path), Tokenizer.load(Path(self.config.tokenizer))
        first, stop = item.piece or (0, len(data.borders) - 1)
        for number in range(first, stop):
            tokens = data.tokens[data.borders[number] : data.borders[number + 1]]
            source = f"{path}@{number}"
            if len(tokens) and (int(tokens.max()) >= tokenizer.size or int(tokens.min()) < 0):
                yield Raw("", self.config.domain or path.stem, source, dropped="not_of_this_tokenizer")
                continue
            kept = tokens[tokens != tokenizer.end_of_text]
            yield Raw(tokenizer.decode(kept.tolist()), self.config.domain or path.stem, source)


def write_indexed(prefix: Path, blocks: Iterator[tuple[np.ndarray, np.ndarray]], end_of_text: int, vocabulary: int) -> int:
    """Write documents as `prefix`.bin and `prefix`.idx; returns how many.

    Args:
        blocks: (token ids [n], row offsets [documents + 1]) of documents that begin with the end-of-text token; they are written ending with it.
        end_of_text: that token.
        vocabulary: ids are stored as uint16 where this fits.
    """
    dtype, code = (np.uint16, 8) if vocabulary <= 1 << 16 else (np.int32, 4)
    lengths: list[np.ndarray] = []
    with atomic_path(Path(f"{prefix}.bin")) as partial, partial.open("wb") as binary:
        for tokens, offsets in blocks:
            rotated = np.empty(len(tokens), dtype=dtype)
            rotated[:-1] = tokens[1:]
            if len(tokens):
                rotated[offsets[1:] - 1] = end_of_text
            binary.write(rotated.tobytes())
            lengths.append(np.diff(offsets).astype(np.int32))
    sizes = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
    pointers = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]) * np.dtype(dtype).itemsize if len(sizes) else np.zeros(0)
    with atomic_path(Path(f"{prefix}.idx")) as partial, partial.open("wb") as index:
        index.write(_HEADER.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        index.write(sizes.tobytes() + pointers.astype(np.int64).tobytes() + np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
    return len(sizes)
