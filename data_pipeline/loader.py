"""The loader: from a corpus and a mixer to the Batch of every step.

The step's sequences are decided globally and the same on every rank; a rank then builds only its share. So the order does not depend on
the number of ranks, and the state is one cursor per domain plus the mixer's.
"""

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from regrowth.data_pipeline.batch import Batch, make_sample_id, split_sample_id
from regrowth.data_pipeline.config import LoaderConfig, Mixing
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.mixing.mixer import Mixer
from regrowth.data_pipeline.mixing.policy import build_policy
from regrowth.data_pipeline.order import PackedBlock, key64, pack_block, permuted, sequences_in
from regrowth.errors import UserError


@dataclass
class Cursor:
    """Where a domain's reading stands: which epoch, which place in its permutation of blocks, which place in that block's of sequences."""

    epoch: int = 0
    position: int = 0
    offset: int = 0


class DomainReader:
    """The sequences of one domain, by (epoch, block, sequence)."""

    def __init__(self, corpus: Corpus, split: str, domain: str, index: int, length: int, seed: int) -> None:
        self.domain, self.index, self.length, self.seed = domain, index, length, seed
        self.shards = corpus.shards(split, domain)
        self.end_of_text = corpus.tokenizer.end_of_text
        self.blocks = [(shard, number) for shard in self.shards for number in range(len(shard.index.blocks))]
        self.counts = [sequences_in(shard.index.blocks[number].tokens, length) for shard, number in self.blocks]
        self._packed = lru_cache(maxsize=2)(self._pack)

    def take(self, cursor: Cursor, count: int) -> list[int]:
        """The next `count` sequences as sample ids; moves the cursor. An epoch ends when every sequence of every block was taken once."""
        taken = []
        for _ in range(count):
            block = permuted(cursor.position, len(self.blocks), key64(self.seed, "blocks", self.domain, cursor.epoch))
            # Neighbours in a block are often cut from one long document: the sequences of a block are permuted too.
            sequence = permuted(cursor.offset, self.counts[block], key64(self.seed, "sequences", self.domain, cursor.epoch, block))
            taken.append(make_sample_id(self.index, cursor.epoch, block, sequence))
            cursor.offset += 1
            if cursor.offset == self.counts[block]:
                cursor.offset, cursor.position = 0, cursor.position + 1
                if cursor.position == len(self.blocks):
                    cursor.position, cursor.epoch = 0, cursor.epoch + 1
        return taken

    def sequence(self, sample_id: int) -> tuple[np.ndarray, ...]:
        """The arrays of one sequence, each [T]."""
        _, epoch, block, sequence = split_sample_id(sample_id)
        packed = self._packed(epoch, block)
        return tuple(getattr(packed, f.name)[sequence] for f in fields(PackedBlock))

    def _pack(self, epoch: int, block: int) -> PackedBlock:
        shard, number = self.blocks[block]
        tokens, row_offsets = shard.block(number)
        return pack_block(tokens, row_offsets, self.length, self.end_of_text, key64(self.seed, "pack", self.domain, epoch, block))


class Loader:
    """Training batches of a corpus under a mixing policy.

    Raises:
        UserError: the mixing config names domains the corpus does not have.
    """

    def __init__(self, corpus: Corpus, config: LoaderConfig, mixing: Mixing) -> None:
        self.corpus, self.config = corpus, config
        self.domains = corpus.domains
        if len(self.domains) > 256:
            raise UserError(
                f"{corpus.folder}: {len(self.domains)} domains; a run mixes at most 256. Set `domain` of some data.sources to merge them."
            )
        tokens = [corpus.tokens("train", d) for d in self.domains]
        policy = build_policy(mixing, self.domains, tokens)
        units = config.global_batch // config.unit_sequences
        self.mixer = Mixer(policy, self.domains, units, config.update_delay, config.seed)
        self.readers = [DomainReader(corpus, "train", d, i, config.sequence_length, config.seed) for i, d in enumerate(self.domains)]
        self.cursors = [Cursor() for _ in self.domains]

    def plan_step(self, step: int) -> list[int]:
        """Draw the step's domains and take its sequences: the sample ids of the global batch, in order. Every rank calls this once a step."""
        drawn = self.mixer.draw(step)
        return [s for domain in drawn for s in self.readers[domain].take(self.cursors[domain], self.config.unit_sequences)]

    def build(self, sample_ids: list[int]) -> Batch:
        """The Batch of these sequences, in this order."""
        return assemble([self.readers[split_sample_id(s)[0]].sequence(s) for s in sample_ids], sample_ids)

    def epochs(self) -> dict[str, float]:
        """How often each domain has been read, in epochs."""
        passed = {}
        for reader, cursor in zip(self.readers, self.cursors, strict=True):
            key = key64(reader.seed, "blocks", reader.domain, cursor.epoch)
            done = sum(reader.counts[permuted(p, len(reader.blocks), key)] for p in range(cursor.position))
            passed[reader.domain] = cursor.epoch + (done + cursor.offset) / max(sum(reader.counts), 1)
        return passed

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state between two steps: nothing in it depends on ranks."""
        return {"identity": self._identity(), "cursors": [asdict(c) for c in self.cursors], "mixer": self.mixer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            UserError: the state belongs to another corpus or to another order; the difference is named.
        """
        mine, theirs = self._identity(), state["identity"]
        if differing := [key for key in mine if mine[key] != theirs.get(key)]:
            told = "; ".join(f"{key}: checkpoint {theirs.get(key)!r}, now {mine[key]!r}" for key in differing)
            raise UserError(f"{self.corpus.folder}: the checkpoint's loader state is of another corpus or order ({told}). "
                            "Resume with the run's own data, or start a new run with run.start_from = the checkpoint.")  # fmt: skip
        self.cursors = [Cursor(**c) for c in state["cursors"]]
        self.mixer.load_state_dict(state["mixer"])

    def _identity(self) -> dict[str, Any]:
        c = self.config
        return {
            "domains": self.domains,
            "tokens": [self.corpus.tokens("train", d) for d in self.domains],
            "tokenizer": self.corpus.manifest["tokenizer"]["hash"],
            "sequence_length": c.sequence_length,
            "unit_sequences": c.unit_sequences,
            "update_delay": c.update_delay,
            "seed": c.seed,
        }


def heldout_batches(corpus: Corpus, domain: str, length: int, limit: int | None = None) -> Batch:
    """Held-out sequences of a domain, in a fixed order, at most `limit` of them."""
    reader = DomainReader(corpus, "heldout", domain, corpus.domains.index(domain), length, seed=0)
    total = sum(reader.counts)
    ids = reader.take(Cursor(), min(total, limit) if limit else total) if total else []
    return assemble([reader.sequence(s) for s in ids], ids, length)


def assemble(sequences: list[tuple[np.ndarray, ...]], sample_ids: list[int], length: int = 0) -> Batch:
    """Stack sequences into a Batch."""
    if not sequences:
        empty = np.zeros((0, length), dtype=np.int32)
        return Batch(empty, empty, empty, empty, empty.astype(np.float32), np.zeros(0, np.int32), np.zeros(0, np.int64))
    tokens, labels, positions, doc_ids, loss_weight = (np.stack(column) for column in zip(*sequences, strict=True))
    domain = np.array([split_sample_id(s)[0] for s in sample_ids], dtype=np.int32)
    return Batch(tokens, labels, positions, doc_ids, loss_weight, domain, np.array(sample_ids, dtype=np.int64))
