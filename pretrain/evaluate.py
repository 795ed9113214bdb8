"""Held-out bits per byte, by domain: exact, because the tokenizer's table says how many bytes each token stands for."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from regrowth.data_pipeline.batch import Batch
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.loader import heldout_batches
from regrowth.parallel.engine import Engine
from regrowth.pretrain.loss import BytesReport, to_tensors


@dataclass(frozen=True)
class DomainScore:
    """What was measured on one domain's held-out text."""

    nats: float
    bytes_: float
    tokens: float

    @property
    def bits_per_byte(self) -> float:
        """Nats of text tokens / (ln 2 * bytes); documents' ends are not counted, as they stand for no bytes."""
        return self.nats / np.log(2) / self.bytes_ if self.bytes_ else float("nan")

    @property
    def loss(self) -> float:
        """Nats per text token."""
        return self.nats / self.tokens if self.tokens else float("nan")


def heldout(corpus: Corpus, length: int, per_domain: int | None) -> Batch:
    """Held-out sequences of all domains, one after the other."""
    parts = [heldout_batches(corpus, d, length, per_domain) for d in corpus.domains]
    return Batch(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Batch)})


def evaluate(engine: Engine, batch: Batch, corpus: Corpus, device: torch.device, on_progress: Callable[[int, int], None] | None = None) -> dict[str, DomainScore]:  # fmt: skip
    """Scores by domain; collective, each data rank takes an equal share of the sequences. Domains without held-out text are left out."""
    report = BytesReport(torch.from_numpy(corpus.tokenizer.bytes_per_token).to(device))
    rows_at_once = engine.forward_rows
    share = -(-len(batch) // (engine.data_ranks * rows_at_once)) * rows_at_once
    start = engine.data_rank * share
    # Every rank must run the same number of equal forward passes: the share is filled up with sequences that count nothing.
    rows = np.minimum(np.arange(start, start + share), len(batch) - 1)
    mine = Batch(**{f.name: getattr(batch, f.name)[rows] for f in fields(Batch)})
    mine.loss_weight[np.arange(start, start + share) >= len(batch)] = 0.0
    reports = []
    for first in range(0, share, rows_at_once):
        part = mine.slice(first, first + rows_at_once)
        reports.append(engine.forward(to_tensors(part, device), report))
        if on_progress:
            on_progress(first + len(part), share)
    sums = engine.gather(torch.cat(reports)).cpu().numpy()[: len(batch)]
    scores = {}
    for index, domain in enumerate(corpus.domains):
        chosen = sums[batch.domain == index]
        if len(chosen):
            scores[domain] = DomainScore(*(float(x) for x in chosen.sum(axis=0)))
    return scores


def total(scores: dict[str, DomainScore], corpus: Corpus) -> DomainScore:
    """All held-out text as one: each domain weighs what its whole held-out text weighs, however much of it was read."""
    whole = {d: sum(row["text_bytes"] for row in corpus.manifest["splits"]["heldout"][d]) for d in scores}
    factors = {d: whole[d] / s.bytes_ if s.bytes_ else 0.0 for d, s in scores.items()}
    return DomainScore(*(sum(getattr(s, part) * factors[d] for d, s in scores.items()) for part in ("nats", "bytes_", "tokens")))
