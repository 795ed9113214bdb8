"""Rephrasing as a transform: a batch's documents, and behind each what a model made of it."""

import atexit
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

from regrowth.data_pipeline.document import DOCUMENT, document_id, mark_dropped
from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache
from regrowth.data_pipeline.rephrase.choose import styles_of
from regrowth.data_pipeline.rephrase.chunks import Chunk, chunks, counter
from regrowth.data_pipeline.rephrase.clean import clean, some_pairs
from regrowth.data_pipeline.rephrase.client import Client
from regrowth.data_pipeline.rephrase.engine import Engine, Request, Ticket
from regrowth.data_pipeline.rephrase.language import LanguageCheck
from regrowth.data_pipeline.rephrase.prompts import Prompt, load_prompt
from regrowth.data_pipeline.transform_config import Rephrase
from regrowth.data_pipeline.transforms.base import Parted, _Base
from regrowth.data_pipeline.transforms.hashing import REPHRASED

if TYPE_CHECKING:
    from regrowth.data_pipeline.rephrase.similarity import SimilarityCheck

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A document, the style that it gets, and its chunks."""

    row: int
    document: Row
    prompt: Prompt
    chunks: list[Chunk]

    def sources(self) -> list[str]:
        """The texts of the chunks."""
        return [self.document["text"][chunk.begin : chunk.end] for chunk in self.chunks]

    def requests(self) -> Iterator[Request]:
        """One for each chunk."""
        for number, text in enumerate(self.sources()):
            yield Request(self.prompt.payload(text), (self.document["id"], self.prompt.mark, str(number)))


class Rephraser(_Base):
    """Keeps documents and adds their rephrases; drops, as documents of the rephrase's domain, answers that are none (`clean`)."""

    name = "rephrase"
    ahead = 2  # so that the last answers of a batch are not waited for with nothing else under way

    def __init__(self, config: Rephrase) -> None:
        self.config = config
        self.prompts = {style: load_prompt(style, config.prompts) for style in config.all_styles}
        self.count_tokens = counter(config.tokenizer)
        self.language = LanguageCheck(config.language) if config.language != "any" else None
        self.similarity = _similarity(config)
        self.engine = build_engine(config)
        atexit.register(self.engine.close)

    def __call__(self, batch: pa.RecordBatch) -> Parted:
        return self.begin(batch)()

    def begin(self, batch: pa.RecordBatch) -> Callable[[], Parted]:
        """Ask for a batch's rephrases."""
        jobs = list(self.jobs(batch))
        ticket = self.engine.begin([request for job in jobs for request in job.requests()])
        return partial(self._finish, batch, jobs, ticket)

    def close(self) -> None:
        """End connections, and what was started to answer."""
        self.engine.close()
        atexit.unregister(self.engine.close)

    def _finish(self, batch: pa.RecordBatch, jobs: list[Job], ticket: Ticket) -> Parted:
        asked = {job.row for job in jobs}
        answers = iter(self.engine.finish(ticket))
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

    def jobs(self, batch: pa.RecordBatch) -> Iterator[Job]:
        """What is to be asked about a batch."""
        for row, style in enumerate(styles_of(batch, self.config)):
            if style:
                document = {name: batch.column(name)[row].as_py() for name in DOCUMENT.names}
                prompt = self.prompts[style]
                yield Job(row, document, prompt, chunks(document["text"], prompt.chunk_tokens, self.count_tokens))

    def judge(self, job: Job, answers: list[Answer]) -> list[tuple[str, str]]:
        """For each chunk (the rephrase, "") or (what was said, why it is dropped)."""
        judged = []
        for number, (source, answer) in enumerate(zip(job.sources(), answers, strict=True)):
            text, reason = clean(answer, source, job.prompt.after, self.count_tokens)
            if not reason and self.language and self.language.wrong(source, text):
                reason = "wrong_language"
            if not reason and job.prompt.after.some_pairs:
                pairs = some_pairs(text, self.count_tokens(source), f"{job.document['id']}#{number}")
                text, reason = (pairs, "") if pairs else (text, "form")
            judged.append((text, reason))
        if self.similarity and (good := [number for number, (_, reason) in enumerate(judged) if not reason]):
            sources = job.sources()
            scores = self.similarity.scores([(sources[number], judged[number][0]) for number in good])
            for number, score in zip(good, scores, strict=True):
                if not score >= self.similarity.config.least:  # NaN is like nothing
                    judged[number] = (judged[number][0], "drifted")
        return judged

    def _reassemble(self, job: Job, answers: list[Answer]) -> tuple[Row | None, list[tuple[Row, str]]]:
        """The rephrased document, of those chunks whose answers are good; and what is dropped, with its reason."""
        texts, places, lost = [], [], []
        for number, (chunk, source, answer, (text, reason)) in enumerate(
            zip(job.chunks, job.sources(), answers, self.judge(job, answers), strict=True)
        ):
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
                "model": self.engine.model, "chunks": places, "of_chunks": len(job.chunks),
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


def _similarity(config: Rephrase) -> "SimilarityCheck | None":
    if config.similarity is None:
        return None
    from regrowth.data_pipeline.rephrase.similarity import SimilarityCheck  # torch takes seconds to import

    return SimilarityCheck(config.similarity)


def build_engine(config: Rephrase) -> Engine:
    """What answers, as the config says."""
    cache = RequestCache(config.cache)
    if config.local is not None:
        from regrowth.data_pipeline.rephrase.local_model import LocalModel

        return LocalModel(config.local, cache, config.budget_tokens, config.retry_errors)
    assert config.server is not None
    return Client(config.server, cache, config.budget_tokens, config.retry_errors)


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
