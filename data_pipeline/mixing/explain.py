"""What a step was made of: which documents, from which shards and sources."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.mixing.decisions import Segment, read_log, segments
from regrowth.data_pipeline.reader import Cursor, DomainReader
from regrowth.errors import UserError


@dataclass(frozen=True)
class DocumentRead:
    """A document, or the part of one, that was in a step."""

    place: int  # the sequence's place in the global batch
    domain: str
    id: str
    source: str
    shard: str
    begin: int  # tokens of the document
    end: int
    text: str


@dataclass(frozen=True)
class StepRead:
    """A step: its decision, its documents in the order of the batch, and the tokens that came from each source file."""

    step: int
    domains: list[str]
    row: dict[str, Any]
    documents: list[DocumentRead]

    @property
    def sources(self) -> Counter[str]:
        """Tokens by source, the place within a file left out."""
        counts: Counter[str] = Counter()
        for document in self.documents:
            counts[document.source.split("@")[0].split("#")[0]] += document.end - document.begin
        return counts


def explain(run: Path, corpus: Corpus, step: int) -> StepRead:
    """Read a step's documents again.

    Raises:
        UserError: the log has no such step, or the corpus is not the one that the run read.
    """
    segment, row = _find(run, step)
    by = segment.decided_by
    config, domains = LoaderConfig.model_validate(by["loader"]), by["domains"]
    for domain in domains:
        if domain not in corpus.domains or corpus.identity(domain) != by["identity"]["domains"][domain]:
            raise UserError(f"{corpus.shown}: not the corpus that step {step} of {run} read: {domain} has other shards.")
    documents = []
    place = 0
    readers = [
        DomainReader(corpus, "train", d, i, config.sequence_length, config.seed, config.packing, True) for i, d in enumerate(domains)
    ]
    cursors = [Cursor(*cursor) for cursor in row["cursors"]]
    for domain in row["draws"]:
        for sample in readers[domain].take(cursors[domain], config.unit_sequences):
            documents += _documents(readers[domain], sample, place)
            place += 1
    return StepRead(step, domains, row, documents)


def _find(run: Path, step: int) -> tuple[Segment, dict[str, Any]]:
    steps: list[int] = []
    for segment in segments(read_log(run)):
        for row in segment.rows:
            if row["step"] == step:
                return segment, row
            steps.append(row["step"])
    raise UserError(
        f"{run}: its log has no step {step}; it has {min(steps)} to {max(steps)}." if steps else f"{run}: no step was logged yet."
    )


def _documents(reader: DomainReader, sample: int, place: int) -> list[DocumentRead]:
    found = []
    tokenizer = reader.corpus.tokenizer
    for piece in reader.pieces(sample):
        shard = piece.shard
        tokens, offsets = shard.block(piece.block)
        table = shard.table(piece.block)
        spans = [(piece.row, piece.begin, piece.end)] if piece.row >= 0 else _spans(offsets, piece.begin, piece.end)
        for row, begin, end in spans:
            first = int(offsets[row] - offsets[0])
            text = tokenizer.decode([int(t) for t in tokens[first + begin : first + end]])
            source = table.column("lineage")[row].as_py()[0]
            shown = shard.shown.removeprefix(f"{reader.corpus.folder}/")
            found.append(DocumentRead(place, reader.domain, table.column("id")[row].as_py(), source, shown, begin, end, text))
    return found


def _spans(offsets: Any, begin: int, end: int) -> list[tuple[int, int, int]]:
    """The documents (row, first token, end) that a stretch of a block covers."""
    starts = offsets - offsets[0]
    spans = []
    for row in range(len(starts) - 1):
        low, high = max(begin, int(starts[row])), min(end, int(starts[row + 1]))
        if low < high:
            spans.append((row, low - int(starts[row]), high - int(starts[row])))
    return spans
