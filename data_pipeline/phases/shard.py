"""The last phases: the tokenizer, the shards, the manifest."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.corpus import SPLITS
from regrowth.data_pipeline.encoder import build_encoder, choose_engine, engine_file
from regrowth.data_pipeline.phases.base import Phase, count, funnel_rows, new_funnel
from regrowth.data_pipeline.phases.curate import Parts
from regrowth.data_pipeline.shards import ShardWriter, shard_metadata, shard_schema, shard_summary
from regrowth.data_pipeline.tokenizer import Tokenizer, train_tokenizer
from regrowth.data_pipeline.transforms.hashing import heldout_mask, split_hashes
from regrowth.errors import UserError, nearest
from regrowth.files import fingerprint, read_json, write_json

if TYPE_CHECKING:
    from regrowth.data_pipeline.pipeline import Pipeline

_BYTES_PER_TOKEN = 4  # about; only to size the tasks
_PROOF_BYTES = 2e6  # of text from all over the corpus, on which the encoders have to agree
_ENCODE_BYTES = 4 << 20  # of text at once


class TokenizerPhase(Phase):
    """Train the tokenizer on a sample of the curated text, or take the given one; then choose the encoder."""

    kind = "tokenizer"
    single = True

    def __init__(self, pipeline: "Pipeline", number: int, parts: Parts) -> None:
        super().__init__(pipeline, number)
        self.parts = parts

    def run(self, task: int) -> dict[str, Any]:
        """Write `tokenizer/tokenizer.json` and `tokenizer/engine.json`."""
        config, out = self.pipeline.config.tokenizer, self.pipeline.root / "tokenizer"
        if config.path:
            given = Tokenizer.load(config.path)
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(given.path, out / "tokenizer.json")
            tokenizer = Tokenizer.load(out)
        else:
            tokenizer = train_tokenizer(self._sample(config.sample_megabytes * 1e6), config.vocabulary, out)
        name, reason = choose_engine(tokenizer, self._sample(_PROOF_BYTES), config.engine)
        write_json(engine_file(self.pipeline.root), {"engine": name, "reason": reason})
        return {"hash": tokenizer.hash, "vocabulary": tokenizer.size, "engine": name, "reason": reason}

    def _sample(self, wanted: float) -> Iterator[str]:
        """Training documents spread evenly over the corpus by their content hash, `wanted` bytes of them, held-out ones left out."""
        total = sum(self.parts.phase.summary["bytes"])
        share = min(1.0, wanted / max(total, 1))
        for part in self.parts.present():
            for batch in self.parts.kept(part):
                hashes = _hashes(batch)
                low = hashes.view("<u8").reshape(-1, 2)[:, 1] if len(batch) else np.zeros(0, np.uint64)
                chosen = ~heldout_mask(split_hashes(batch, hashes), self.pipeline.config.heldout_fraction)
                if share < 1:
                    chosen &= low < np.uint64(int(share * 2**64))
                yield from batch.column("text").filter(pa.array(chosen)).to_pylist()


class ShardPhase(Phase):
    """Encode documents into shards by split and domain. A task is a run of neighbouring parts of about a shard's worth of text.

    What a task writes depends on the corpus and the config alone, so the shards are the same whoever wrote them.
    """

    kind = "shards"

    def __init__(self, pipeline: "Pipeline", number: int, parts: Parts) -> None:
        super().__init__(pipeline, number)
        self.parts = parts
        self.groups: list[list[int]] = []
        weight, names = pipeline.config.shards.weight, pipeline.score_names
        if weight is not None and weight not in names:
            raise UserError(f"data.shards.weight = {weight}: no transform of the recipe gives this score; {nearest(weight, names)}")

    def sizes(self) -> list[int]:
        """Bytes of text in each group of parts."""
        target = self.pipeline.config.shards.shard_tokens * _BYTES_PER_TOKEN
        sizes, held, size = [], [], 0
        present = self.parts.present()
        for part in present:
            held.append(part)
            size += self.parts.phase.summary["bytes"][part]
            if size >= target or part == present[-1]:
                self.groups.append(held)
                sizes.append(size)
                held, size = [], 0
        return sizes

    def run(self, task: int) -> dict[str, Any]:
        """Write the shards of one group."""
        assert len(self.task_sizes) == len(self.groups)
        root, config = self.pipeline.root, self.pipeline.config
        for stale in root.glob(f"*/*/.{task:05d}-*.partial-*"):
            stale.unlink(missing_ok=True)
        tokenizer = Tokenizer.load(root / "tokenizer")
        # The choice is on file; being told to use the reference goes before it (the remedy when the two disagree later on).
        engine = "tokenizers" if config.tokenizer.engine == "tokenizers" else read_json(engine_file(root))["engine"]
        encoder = build_encoder(tokenizer, engine)
        writers: dict[tuple[str, str], ShardWriter] = {}
        funnel, documents = new_funnel(), 0
        with contextlib.ExitStack() as stack:
            drop = stack.enter_context(self.dropping(task, funnel))
            stack.callback(lambda: [writer.abandon() for writer in writers.values()])
            for part in self.groups[task]:
                for batch in self.parts.read(part, funnel, drop):
                    for piece in _pieces(batch):
                        ids, offsets = encoder.encode(piece.column("text").to_pylist())
                        held = heldout_mask(split_hashes(piece, _hashes(piece)), config.heldout_fraction)
                        for split, where in zip(SPLITS, (~held, held), strict=True):
                            count(funnel, piece.filter(pa.array(where)), f"split_{split}", "")
                        self._write(piece, ids, offsets, held, tokenizer, writers, task)
                        documents += len(piece)
            shards = [
                [split, domain, shard_summary(index, f"{split}/{domain_folder(domain)}/{name}")]
                for (split, domain), writer in sorted(writers.items())
                for name, index in writer.close()
            ]
        return {"documents": documents, "bytes": self.task_sizes[task], "shards": shards, "funnel": funnel_rows(funnel)}

    def _write(self, batch: pa.RecordBatch, ids: np.ndarray, offsets: np.ndarray, held: np.ndarray, tokenizer: Tokenizer,
               writers: dict[tuple[str, str], ShardWriter], task: int) -> None:  # fmt: skip
        config, score_names = self.pipeline.config, self.pipeline.score_names
        codes = batch.column("domain").dictionary_encode()
        domain_of, domains = codes.indices.to_numpy(), codes.dictionary.to_pylist()
        lengths, text_bytes = np.diff(offsets), pc.binary_length(batch.column("text")).to_numpy(zero_copy_only=False)
        lineage = _with_source(batch)
        scores, weights = _score_struct(batch, score_names), _weights(batch, config.shards.weight)
        for split, in_split in zip(SPLITS, (~held, held), strict=True):
            for code, domain in enumerate(domains):
                rows = np.flatnonzero(in_split & (domain_of == code))
                if not len(rows):
                    continue
                if (split, domain) not in writers:
                    schema = shard_schema(tokenizer.size, shard_metadata(domain, tokenizer.size, tokenizer.hash), score_names)
                    folder = self.pipeline.root / split / domain_folder(domain)
                    writers[split, domain] = ShardWriter(
                        folder, f"{task:05d}", schema, config.shards.block_tokens, config.shards.shard_tokens
                    )
                writer = writers[split, domain]
                chosen = ids if len(rows) == len(batch) else ids[np.repeat(in_split & (domain_of == code), lengths)]
                value_type = writer.schema.field("tokens").type.value_type
                starts = np.concatenate([[0], np.cumsum(lengths[rows])])
                take = pa.array(rows)
                columns = [
                    pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(chosen.astype(value_type.to_pandas_dtype()))),
                    batch.column("id").take(take),
                    batch.column("domain").take(take),
                    batch.column("level").take(take),
                    lineage.take(take),
                    scores.take(take),
                    pa.array(weights[rows] if split == "train" else np.ones(len(rows), dtype=np.float32)),
                ]
                writer.add(pa.RecordBatch.from_arrays(columns, schema=writer.schema), text_bytes[rows])


class FinishPhase(Phase):
    """Write `corpus.json`, which makes the corpus."""

    kind = "finish"
    single = True

    def __init__(self, pipeline: "Pipeline", number: int, shards: ShardPhase) -> None:
        super().__init__(pipeline, number)
        self.shards = shards

    def run(self, task: int) -> dict[str, Any]:
        """Gather the shards of all tasks and the funnel of all phases.

        Raises:
            UserError: nothing came out, with the reasons counted; or a split got no document.
        """
        pipeline = self.pipeline
        splits: dict[str, dict[str, list[Any]]] = {split: {} for split in SPLITS}
        for number in range(len(self.shards.task_sizes)):
            for split, domain, summary in self.shards.record(number)["shards"]:
                splits[split].setdefault(domain, []).append(summary)
        config = pipeline.config
        for split, remedy in (("train", "Add documents."), ("heldout", "Add documents or raise data.heldout_fraction.")):
            if not splits[split]:
                raise UserError(
                    f"data.heldout_fraction = {config.heldout_fraction}: the {split} split got no document; the corpus is too small. {remedy}"
                )
        tokenizer = Tokenizer.load(pipeline.root / "tokenizer")
        manifest = {
            "format": 1,
            "name": config.name,
            "config": config.model_dump(mode="json"),
            "tokenizer": {"hash": tokenizer.hash, "vocabulary": tokenizer.size, **read_json(engine_file(pipeline.root))},
            "splits": {split: dict(sorted(by_domain.items())) for split, by_domain in splits.items()},
            "funnel": funnel_rows(pipeline.funnel()),
            "counts": pipeline.counts(),
            "notes": pipeline.notes(),
            "given_up": pipeline.given_up(),
        }
        write_json(pipeline.root / "corpus.json", manifest)
        return {}


def domain_folder(domain: str) -> str:
    """A domain's name as a folder name: what is not plain is escaped, so that two domains never share one."""
    name = "".join(
        c if c.isalnum() or (c in "-_." and domain[0] != ".") else "".join(f"%{byte:02x}" for byte in c.encode("utf-8", "surrogatepass"))
        for c in domain
    )
    if len(name.encode()) > 120:  # file systems end at 255 bytes
        name = f"{name[:30]}-{fingerprint(domain)}"
    return name or "%empty"


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in runs of rows of about `_ENCODE_BYTES` of text."""
    ends = np.cumsum(pc.binary_length(batch.column("text")).to_numpy(zero_copy_only=False))
    begin = 0
    while begin < len(batch):
        before = int(ends[begin - 1]) if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, before + _ENCODE_BYTES)))
        yield batch.slice(begin, stop - begin)
        begin = stop


def _hashes(batch: pa.RecordBatch) -> np.ndarray:
    column = batch.column("content_hash")
    buffer = column.buffers()[1]
    return np.frombuffer(buffer, "V16", count=len(batch), offset=16 * column.offset) if len(batch) else np.zeros(0, "V16")


def _with_source(batch: pa.RecordBatch) -> pa.ListArray:
    """Each document's lineage with its source in front."""
    lineage = batch.column("lineage")
    offsets = lineage.offsets.to_numpy().astype(np.int64)
    begin, stop, documents = int(offsets[0]), int(offsets[-1]), len(batch)
    links = pa.concat_arrays([batch.column("source"), lineage.values.slice(begin, stop - begin)])
    order = np.insert(np.arange(documents, documents + stop - begin), offsets[:-1] - begin, np.arange(documents))
    new = offsets - begin + np.arange(documents + 1)
    return pa.ListArray.from_arrays(pa.array(new, pa.int32()), links.take(pa.array(order)))


def _weights(batch: pa.RecordBatch, name: str | None) -> np.ndarray:
    """float32 [documents]: the score that documents weigh by, at least 0."""
    from regrowth.data_pipeline.transforms.base import score_of

    if name is None:
        return np.ones(len(batch), dtype=np.float32)
    return np.maximum(np.nan_to_num(score_of(batch.column("scores"), name, 1.0), nan=1.0), 0.0)


def _score_struct(batch: pa.RecordBatch, names: list[str]) -> pa.StructArray:
    from regrowth.data_pipeline.transforms.base import score_of

    fields = []
    for name in names or ["quality"]:
        values = score_of(batch.column("scores"), name, np.nan)
        fields.append(pa.array(values, pa.float32(), mask=np.isnan(values)))
    return pa.StructArray.from_arrays(fields, names or ["quality"])
