"""The baseline that every small model must beat: an interpolated byte trigram trained on the same text (Witten-Bell smoothing).

Its unit is the byte, so it compares with any tokenizer in bits per byte.
"""

from collections.abc import Iterator

import numpy as np

from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.tokenizer import Tokenizer


def domain_bytes(corpus: Corpus, split: str, domain: str) -> Iterator[np.ndarray]:
    """The text of a domain as uint8 arrays, one a block; documents are joined by a zero byte, which no curated text holds."""
    for shard in corpus.shards(split, domain):
        for number in range(len(shard.index.blocks)):
            yield to_bytes(shard.block(number)[0], corpus.tokenizer)


def to_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The bytes that token ids stand for; END_OF_TEXT becomes one zero byte."""
    pieces = [piece or b"\0" for piece in tokenizer.pieces]
    lengths = np.array([len(piece) for piece in pieces])
    flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    sizes = lengths[tokens]
    ends = np.cumsum(sizes)
    return flat[np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts[tokens] - (ends - sizes), sizes)]


class ByteTrigram:
    """P(c | a b), interpolated down to bigram, unigram and uniform.

    Witten-Bell: with n occurrences and t distinct successors of a context, P = (count + t * P_lower) / (n + t).
    """

    def __init__(self, corpus: Corpus) -> None:
        three = np.zeros(1 << 24, dtype=np.int32)
        for domain in corpus.domains:
            for data in domain_bytes(corpus, "train", domain):
                codes = data[:-2].astype(np.int32) << 16 | data[1:-1].astype(np.int32) << 8 | data[2:]
                three += np.bincount(codes, minlength=1 << 24).astype(np.int32)
        self.three = three.reshape(65536, 256)
        two = self.three.reshape(256, 256, 256).sum(axis=0, dtype=np.int64)
        one = two.sum(axis=0)
        self.one = _interpolate(one[None], np.full((1, 256), 1 / 256.0))[0]
        self.two = _interpolate(two, self.one[None])
        self.total = self.three.sum(axis=1, dtype=np.int64)
        self.kinds = np.count_nonzero(self.three, axis=1)

    def bits_per_byte(self, corpus: Corpus) -> dict[str, float]:
        """On the held-out text of each domain; the zero bytes between documents are context but are not counted."""
        return {d: bits / bytes_ for d, (bits, bytes_) in self.bits(corpus).items() if bytes_}

    def bits(self, corpus: Corpus) -> dict[str, tuple[float, int]]:
        """(bits, bytes) of each domain's held-out text."""
        sums = {}
        for domain in corpus.domains:
            bits, count = 0.0, 0
            for data in domain_bytes(corpus, "heldout", domain):
                chosen = data[2:] != 0
                context = (data[:-2].astype(np.int32) << 8 | data[1:-1])[chosen]
                target = data[2:][chosen]
                lower = self.two[context & 255, target]
                kinds, total = self.kinds[context], self.total[context]
                # A context never seen has no kinds: all of its mass goes to the bigram.
                p = np.where(total > 0, (self.three[context, target] + kinds * lower) / np.maximum(total + kinds, 1), lower)
                bits -= float(np.log2(p).sum())
                count += len(target)
            sums[domain] = (bits, count)
        return sums


def _interpolate(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=-1, keepdims=True).astype(np.float64)
    kinds = np.count_nonzero(counts, axis=-1, keepdims=True)
    return np.where(total > 0, (counts + kinds * lower) / np.maximum(total + kinds, 1), lower)
