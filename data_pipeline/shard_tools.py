"""What can be done with shards outside a corpus: look into one, count, merge, split, hand over to Megatron-LM."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc, read_stream
from regrowth.data_pipeline.corpus import SPLITS, Corpus
from regrowth.data_pipeline.phases.shard import domain_folder
from regrowth.data_pipeline.shards import REMEDY, Shard, ShardIndex, ShardWriter
from regrowth.data_pipeline.sources.megatron import write_indexed
from regrowth.errors import UserError


@dataclass
class Statistics:
    """Counts over shards. Lengths are tokens per document, document start included; `histogram` has powers of two as lower bounds."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    longest: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    by_domain: Counter[str] = field(default_factory=Counter)  # tokens
    by_source: Counter[str] = field(default_factory=Counter)  # tokens, by file
    by_level: Counter[int] = field(default_factory=Counter)  # tokens, by refinement level

    def add(self, shard: Shard) -> None:
        """Count one shard."""
        self.text_bytes += shard.index.text_bytes
        for batch in batches(shard):
            lengths = np.diff(batch.column("tokens").offsets.to_numpy())
            self.documents += len(batch)
            self.tokens += int(lengths.sum())
            self.longest = max(self.longest, int(lengths.max(initial=0)))
            bins, counts = np.unique(np.floor(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
            self.histogram.update({int(2**b): int(c) for b, c in zip(bins, counts, strict=True)})
            self.by_domain[shard.index.domain] += int(lengths.sum())
            levels = batch.column("level").to_numpy()
            for level in np.unique(levels):
                self.by_level[int(level)] += int(lengths[levels == level].sum())
            files = pc.replace_substring_regex(pc.list_element(batch.column("lineage"), 0), r"[@#][^/]*$", "").dictionary_encode()
            sums = np.bincount(files.indices.to_numpy(), weights=lengths, minlength=len(files.dictionary))
            self.by_source.update({name: int(s) for name, s in zip(files.dictionary.to_pylist(), sums, strict=True)})


def batches(shard: Shard) -> Iterator[pa.RecordBatch]:
    """The record batches of a shard, each one block.

    Raises:
        UserError: the shard is damaged.
    """
    for _, batch in read_stream(shard.path, REMEDY):
        yield batch


def corpus_statistics(corpus: Corpus, split: str) -> Statistics:
    """Counts over one split of a corpus."""
    statistics = Statistics()
    for domain in sorted(corpus.manifest["splits"][split]):
        for shard in corpus.shards(split, domain):
            statistics.add(shard)
    return statistics


def sample(shard: Shard, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Some documents of a shard as rows, chosen evenly at random."""
    chosen = np.sort(np.random.default_rng(seed).choice(shard.index.documents, min(count, shard.index.documents), replace=False))
    rows, start = [], 0
    for batch in batches(shard):
        here = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
        rows += batch.take(pa.array(here)).to_pylist()
        start += len(batch)
    return rows


def merge(shards: list[Shard], out: Path, block_tokens: int) -> ShardIndex:
    """One shard of several, their documents in the order given.

    Raises:
        UserError: they are of different domains or tokenizers, or `out` exists.
    """
    first = shards[0]
    for shard in shards[1:]:
        for what in ("domain", "tokenizer_hash", "token_bytes"):
            if getattr(shard.index, what) != getattr(first.index, what):
                raise UserError(f"{shard.path}: its {what} is {getattr(shard.index, what)}, that of {first.path} is {getattr(first.index, what)}; "
                                "only shards of one domain and one tokenizer can be merged.")  # fmt: skip
        if not _schema(shard).equals(_schema(first)):
            raise UserError(f"{shard.path}: its columns are not those of {first.path} (other scores, or another version wrote it); "
                            "only shards of the same columns can be merged.")  # fmt: skip
    ((_, index),) = _rewrite(shards, out, block_tokens, 1 << 62)
    return index


def split(shard: Shard, out: Path, parts: int, block_tokens: int) -> list[tuple[str, ShardIndex]]:
    """Several shards of one, of about equal tokens, their documents in order.

    Raises:
        UserError: `out` exists, or the shard has fewer documents than parts.
    """
    if shard.index.documents < parts:
        raise UserError(f"{shard.path}: {shard.index.documents} documents cannot be split in {parts} parts.")
    target = -(-shard.index.tokens // parts)
    return _rewrite([shard], out, min(block_tokens, target), target)


def _schema(shard: Shard) -> pa.Schema:
    with pa.ipc.open_stream(pa.memory_map(str(shard.path))) as reader:
        return reader.schema


def _rewrite(shards: list[Shard], out: Path, block_tokens: int, shard_tokens: int) -> list[tuple[str, ShardIndex]]:
    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder.")
    out.mkdir(parents=True)
    writer = ShardWriter(out, "00000", _schema(shards[0]), block_tokens, shard_tokens)
    for shard in shards:
        rate = shard.index.text_bytes / max(shard.index.tokens, 1)
        counted = 0
        for batch in batches(shard):
            lengths = np.diff(batch.column("tokens").offsets.to_numpy())
            # The bytes of each document's text are not stored; the shard's own sum is shared out by tokens and kept exact.
            ends = np.round((counted + np.cumsum(lengths)) * rate).astype(np.int64)
            text_bytes = np.diff(ends, prepend=round(counted * rate))
            counted += int(lengths.sum())
            writer.add(batch, text_bytes)
    return writer.close()


def export_megatron(corpus: Corpus, out: Path) -> dict[str, int]:
    """Every split and domain as OUT/<split>/<domain>.bin and .idx; returns documents by prefix.

    Raises:
        UserError: `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder.")
    written = {}
    for part in SPLITS:
        for domain in sorted(corpus.manifest["splits"][part]):
            shards = corpus.shards(part, domain)
            blocks = (shard.block(number) for shard in shards for number in range(len(shard.index.blocks)))
            prefix = out / part / domain_folder(domain)
            prefix.parent.mkdir(parents=True, exist_ok=True)
            written[f"{part}/{domain}"] = write_indexed(prefix, blocks, corpus.tokenizer.end_of_text, corpus.tokenizer.size)
    return written
