"""What a learning policy is paid: a domain's loss, its fall below its own running mean, or its excess over a reference."""

from pathlib import Path
from typing import Any

from regrowth.data_pipeline.mixing.policy import check_names
from regrowth.errors import UserError
from regrowth.files import read_jsonl

_SMOOTHING = 0.9  # of the running mean that `decrease` is measured from


class Reward:
    """Turns a step's losses by domain into rewards; the running means of `decrease` are state."""

    def __init__(self, kind: str, reference: list[float] | None, domains: int) -> None:
        self.kind, self.reference = kind, reference
        self.means: list[float | None] = [None] * domains

    def of(self, losses: dict[int, float]) -> dict[int, float]:
        """Rewards by domain. A first loss has nothing to have fallen from, and gives none under `decrease`."""
        if self.kind == "loss":
            return losses
        if self.kind == "excess":
            assert self.reference is not None
            return {domain: max(loss - self.reference[domain], 0.0) for domain, loss in losses.items()}
        rewards = {}
        for domain, loss in losses.items():
            mean = self.means[domain]
            if mean is not None:
                rewards[domain] = mean - loss
            self.means[domain] = loss if mean is None else _SMOOTHING * mean + (1.0 - _SMOOTHING) * loss
        return rewards


def reference_losses(reference: dict[str, float] | Path | None, domains: list[str]) -> list[float] | None:
    """Nats per token by domain, from a table or from the last evaluation of a run.

    Raises:
        UserError: a domain is missing or unknown, or the run has no evaluation.
    """
    if reference is None:
        return None
    key = "mixing.reference"
    if isinstance(reference, Path):
        rows: list[dict[str, Any]] = read_jsonl(reference / "evaluations.jsonl")
        if not rows:
            raise UserError(
                f"{key} = {reference}: no evaluations.jsonl with an evaluation in it; name the folder of a run that was evaluated."
            )
        table = {name: float(scores["loss"]) for name, scores in rows[-1]["domains"].items() if name in domains}
    else:
        check_names(table := reference, domains, key)
    if missing := [domain for domain in domains if domain not in table]:
        raise UserError(f"{key}: no loss for {', '.join(missing)}. Give one for each domain, or take a run that has these domains.")
    return [table[domain] for domain in domains]
