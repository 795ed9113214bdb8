"""Rephrasing as a transform: a batch's documents, and behind each what a model made of it."""

import atexit
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.document import DOCUMENT, document_id, mark_dropped
from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache
from regrowth.data_pipeline.rephrase.chunks import Chunk, CountTokens, chunks, estimated_tokens
from regrowth.data_pipeline.rephrase.clean import clean
from regrowth.data_pipeline.rephrase.client import Client, Request
from regrowth.data_pipeline.rephrase.prompts import Prompt, load_prompt
from regrowth.data_pipeline.transform_config import Rephrase
from regrowth.data_pipeline.transforms.base import _Base
from regrowth.data_pipeline.transforms.hashing import REPHRASED

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A document, the style that it gets, and its chunks."""

    row: int
    document: Row
    prompt: Prompt
    chunks: list[Chunk]

    def requests(self) -> Iterator[Request]:
        """One for each chunk."""
        for number, chunk in enumerate(self.chunks):
            text = self.document["text"][chunk.begin : chunk.end]
            yield Request(self.prompt.payload(text), (self.document["id"], self.prompt.mark, str(number)))


class Rephraser(_Base):
    """Keeps documents and adds their rephrases; drops, as documents of the rephrase's domain, answers that are none (`clean`)."""

    name = "rephrase"

    def __init__(self, config: Rephrase) -> None:
        self.config = config
        self.prompts = {style: load_prompt(style, config.prompts) for style in config.styles}
        self.count_tokens = counter(config.tokenizer)
        self.client = Client(config.server, RequestCache(config.cache), config.budget_tokens, config.retry_errors)
        atexit.register(self.client.close)

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        jobs = list(self._jobs(batch))
        asked = {job.row for job in jobs}
        answers = iter(self.client.answers([request for job in jobs for request in job.requests()]))
        written: list[tuple[int, Row]] = [(row, {}) for row in range(len(batch)) if self.config.keep_source or row not in asked]
        dropped: list[tuple[Row, str]] = []
        for job in jobs:
            rephrase, lost = self._reassemble(job, [next(answers) for _ in job.chunks])
            dropped += lost
            if rephrase is not None:
                written.append((job.row, rephrase))
            if not self.config.keep_source:
                dropped.append((job.document, "rephrased" if rephrase is not None else "no_rephrase"))
        return _interleaved(batch, written), _dropped(dropped, self.name)

    def style_of(self, document: str) -> str:
        """The style that a document gets, by its id: the same in every run and on every machine."""
        styles, bounds = list(self.config.styles), np.cumsum(list(self.config.styles.values()))
        draw = xxhash.xxh3_64_intdigest(f"style\x1f{document}".encode()) / 2**64
        return styles[int(np.searchsorted(bounds, draw * bounds[-1], side="right"))]

    def _jobs(self, batch: pa.RecordBatch) -> Iterator[Job]:
        wanted = pa.array(range(len(batch)), pa.int64())
        if self.config.domains:
            wanted = wanted.filter(pc.is_in(batch.column("domain"), pa.array(self.config.domains)))
        for row in wanted.to_pylist():
            document = {name: batch.column(name)[row].as_py() for name in DOCUMENT.names}
            prompt = self.prompts[self.style_of(document["id"])]
            yield Job(row, document, prompt, chunks(document["text"], prompt.chunk_tokens, self.count_tokens))

    def _reassemble(self, job: Job, answers: list[Answer]) -> tuple[Row | None, list[tuple[Row, str]]]:
        """The rephrased document, of those chunks whose answers are good; and what is dropped, with its reason."""
        texts, places, lost = [], [], []
        for number, (chunk, answer) in enumerate(zip(job.chunks, answers, strict=True)):
            source = job.document["text"][chunk.begin : chunk.end]
            text, reason = clean(answer, source, job.prompt.after, self.count_tokens)
            self.counts["prompt tokens"] += answer.prompt_tokens
            self.counts["completion tokens"] += answer.completion_tokens
            self.counts[f"{job.prompt.name}: {reason or 'good'}"] += 1
            if reason:
                lost.append((self._document(job, text, f"#{number}", [[chunk.begin, chunk.end]]), reason))
            else:
                texts.append(f"{source}\n\n{text}" if job.prompt.after.append else text)
                places.append([chunk.begin, chunk.end])
        return (self._document(job, "\n\n".join(texts), "", places) if texts else None), lost

    def _document(self, job: Job, text: str, part: str, places: list[list[int]]) -> Row:
        source, style = job.document, job.prompt.name
        place = f"{source['source']}{REPHRASED}{job.prompt.mark}{part}"
        meta = {**json.loads(source["meta"] or "{}"), "rephrased": {"of": source["id"], "style": style, "version": job.prompt.version,
                "model": self.config.server.model, "chunks": places, "of_chunks": len(job.chunks),
                "text_hash": xxhash.xxh3_128_hexdigest(source["text"].encode())}}  # fmt: skip
        return {
            **source,
            "id": document_id(place),
            "text": text,
            "domain": self.config.domain.format(domain=source["domain"], style=style),
            "source": place,
            "level": max(source["level"], job.prompt.level),
            "lineage": [*source["lineage"], f"rephrase:{job.prompt.mark}"],
            "meta": json.dumps(meta),
        }


def counter(tokenizer: str | None) -> CountTokens:
    """How tokens are counted: by a tokenizer.json, or by bytes."""
    if tokenizer is None:
        return estimated_tokens
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(Path(tokenizer)))
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)


def _interleaved(batch: pa.RecordBatch, written: list[tuple[int, Row]]) -> pa.RecordBatch:
    """The batch's own rows (an empty dict) and rephrases, each behind the row it came from."""
    rows = [rephrase for _, rephrase in written if rephrase]
    new = pa.RecordBatch.from_pylist(rows, schema=DOCUMENT)
    order, place = [], len(batch)
    for row, rephrase in written:
        order.append((row, bool(rephrase), place if rephrase else row))
        place += bool(rephrase)
    both = pa.Table.from_batches([batch, new]).combine_chunks()
    taken = both.take(pa.array([at for *_, at in sorted(order)], pa.int64())).combine_chunks()
    return taken.to_batches()[0] if len(taken) else batch.slice(0, 0)


def _dropped(rows: list[tuple[Row, str]], name: str) -> pa.RecordBatch | None:
    if not rows:
        return None
    return mark_dropped(pa.RecordBatch.from_pylist([row for row, _ in rows], schema=DOCUMENT), name, [reason for _, reason in rows])
