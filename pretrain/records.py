"""What a run writes down about itself: events, metrics, decisions and evaluations. Every rank calls alike; what all know, the first writes."""

import time
from typing import Any

import numpy as np
import torch

from regrowth.data_pipeline.batch import split_sample_id
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.loader import Loader
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.evaluate import DomainScore, total
from regrowth.pretrain.metrics import MetricsWriter, model_flops_utilization, peak_memory_bytes
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.session import Session


class Records:
    """One rank's pen."""

    def __init__(self, run: RunFolder, corpus: Corpus, device: torch.device, rank: int) -> None:
        self.run, self.corpus, self.device, self.rank = run, corpus, device, rank
        self.metrics = MetricsWriter(run) if rank == 0 else None

    def event(self, event: str, **details: Any) -> None:
        """Something that happened to the run."""
        if self.rank == 0:
            self.run.log("events", {"event": event, "time": time.time(), **details})

    def decided_by(self, step: int, loader: Loader, anyway: bool = False) -> None:
        """Say in the decision log what the decisions from here on are made by, unless the last to say so said the same."""
        if self.rank != 0:
            return
        segment = loader.segment()
        before = self.run.decided_by()
        if anyway or any(before.get(key) != value for key, value in segment.items()):
            self.run.log("mixing", {"step": step, **segment})
            if before:
                self.event("mixture", step=step, policy=segment["mixing"]["policy"], domains=len(segment["domains"]))

    def data(self, step: int, loader: Loader) -> None:
        """Damaged blocks that were skipped, on whichever rank; domains whose loss no longer falls."""
        for damage in loader.damage():
            row = {"step": step, "rank": self.rank, "shard": damage.shard, "block": damage.block, "tokens": damage.tokens}
            self.run.log("damaged", {**row, "reason": damage.reason})
            self.event("damaged block skipped", **row)
        for domain, saturated in loader.mixer.verdicts():
            self.event("saturated" if saturated else "learning again", step=step, domain=domain)

    def step(
        self, config: RunConfig, session: Session, numbers: dict[str, Any], decision: dict[str, Any], routed: dict[str, Any] | None
    ) -> None:
        """A step.

        Args:
            numbers: step, loss, lr, grad_norm, tokens, seconds.
            routed: the routers' statistics, where there are any.
        """
        if self.metrics is None:
            return
        domains, rate = self.corpus.domains, numbers["tokens"] / numbers["seconds"]
        flops = session.model_config.train_flops_per_token(config.loader.length_at(numbers["step"]))
        row = {
            **numbers,
            "data_wait": session.feed.waited,
            "tokens_per_second": rate,
            "mfu": model_flops_utilization(rate * flops, config, self.device),
            "domain_loss": {domains[int(d)]: x for d, x in decision["losses"].items()},
            "mixture": dict(zip(domains, decision["probabilities"], strict=True)),
            "precision": session.precision.recipe.name,
            "layers": session.model_config.layers,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        self.metrics.step({**row, "routers": routed} if routed else row, decision)

    def precision(self, step: int, errors: dict[str, dict[str, float]], fallen: list[str]) -> None:
        """What rounding cost, where it was measured, and the linears that go wide for it."""
        if errors and self.rank == 0:
            self.run.log("precision", {"step": step, "errors": errors})
        for name in fallen:
            self.event("linear goes wide", step=step, linear=name, errors=errors[name])

    def evaluation(self, step: int, scores: dict[str, DomainScore], final: bool, note: str) -> None:
        """A look at held-out text; one that was written before a stop, and is met again on the way from the same checkpoint, is written once."""
        if self.metrics is None:
            return
        overall = total(scores, self.corpus)
        row = {"step": step, "final": final, "note": note, "bits_per_byte": overall.bits_per_byte, "loss": overall.loss,
               "domains": {d: {"bits_per_byte": s.bits_per_byte, "loss": s.loss, "bytes": s.bytes_} for d, s in scores.items()}}  # fmt: skip
        if (step, note, final) not in {(r["step"], r["note"], r["final"]) for r in self.run.rows("evaluations")}:
            self.run.log("evaluations", row)
            self.metrics.evaluation(row)

    def evaluated(self, step: int) -> bool:
        """Whether the look that is due at a step was written down."""
        return any(row["step"] == step and not row["note"] for row in self.run.rows("evaluations"))

    def close(self) -> None:
        """Flush."""
        if self.metrics:
            self.metrics.close()


def domain_losses(ids: list[int], sums: np.ndarray) -> dict[int, float]:
    """Mean loss of each domain of a step, summed in unit order in fp64, the same on every rank and for every number of ranks.

    Args:
        ids: of the sequences, in the batch's order.
        sums: float64 [sequences or a multiple, 2], weighted losses and weights.
    """
    domain = np.repeat([split_sample_id(s)[0] for s in ids], len(sums) // len(ids))  # a sequence may have been cut into several
    return {int(d): float(sums[domain == d, 0].sum() / max(sums[domain == d, 1].sum(), 1.0)) for d in np.unique(domain)}
