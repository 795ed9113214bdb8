"""The Batch: what the loader hands to every engine, built before any splitting over ranks."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Sequences of one micro-batch or of a whole step; B sequences of length T.

    RoPE takes `positions` as given, and masks compare (document, position), so that packing, padding and context parallelism agree.
    """

    tokens: np.ndarray  # int32 [B, T]
    labels: np.ndarray  # int32 [B, T], already shifted
    positions: np.ndarray  # int32 [B, T]
    doc_ids: np.ndarray  # int32 [B, T], -1 is padding
    loss_weight: np.ndarray  # float32 [B, T]
    domain: np.ndarray  # int32 [B], index into the run's domains
    sample_id: np.ndarray  # int64 [B], unique over (domain, epoch, block, sequence)

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, stop: int) -> "Batch":
        """The sequences `start` to `stop`, as views."""
        return Batch(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    def cut(self, length: int) -> "Batch":
        """The same tokens as sequences of a shorter length that divides T; positions begin anew where a document is cut."""
        if length == self.tokens.shape[1]:
            return self
        pieces = self.tokens.shape[1] // length
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        cut = {name: x.reshape(-1, length) if x.ndim == 2 else np.repeat(x, pieces) for name, x in columns.items()}
        first = cut["doc_ids"][:, :1]
        cut["positions"] = np.where(cut["doc_ids"] == first, cut["positions"] - cut["positions"][:, :1], cut["positions"])
        cut["doc_ids"] = np.where(cut["doc_ids"] < 0, -1, cut["doc_ids"] - first)
        return Batch(**cut)

    def boundaries(self) -> tuple[np.ndarray, int]:
        """Where documents begin in the sequences laid end to end, for attention of variable length: int32 [documents + 1] and the longest.

        Padding counts as a document of its own.
        """
        starts = np.ones(self.doc_ids.shape, dtype=bool)
        starts[:, 1:] = self.doc_ids[:, 1:] != self.doc_ids[:, :-1]
        places = np.append(np.flatnonzero(starts), starts.size).astype(np.int32)
        return places, int(np.diff(places).max(initial=0))


def make_sample_id(domain: int, epoch: int, block: int, sequence: int) -> int:
    """One number for one sequence of a run: 8 bits of domain, 15 of epoch, 22 of block, 18 of sequence."""
    if not (domain < 1 << 8 and epoch < 1 << 15 and block < 1 << 22 and sequence < 1 << 18):
        raise OverflowError(f"sample id out of range: domain {domain}, epoch {epoch}, block {block}, sequence {sequence}")
    return domain << 55 | epoch << 40 | block << 18 | sequence


def domain_of(sample_ids: np.ndarray) -> np.ndarray:
    """int32 [B]: the domains of sample ids int64 [B]."""
    return (sample_ids >> 55).astype(np.int32)


def split_sample_id(sample_id: int) -> tuple[int, int, int, int]:
    """(domain, epoch, block, sequence) of a sample id."""
    return sample_id >> 55, sample_id >> 40 & 0x7FFF, sample_id >> 18 & 0x3FFFFF, sample_id & 0x3FFFF
