"""The decision log of a run, `mixing.jsonl`: read, recomputed, and followed by another run.

Two kinds of rows. A *segment* row says what the decisions from its step on are made by: mixing and loader config, domains, their identity. A
*decision* row is one step: probabilities [K], draws [units], losses by domain, the rewards the policy had [K], and each domain's cursor before
the step (epoch, position, offset, sequences taken so far). Domains are numbers into the segment's list.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrowth.errors import Exhausted, UserError
from regrowth.files import read_jsonl

# What two runs must share for one to follow the other's decisions.
_SHARED = ("tokenizer", "sequence_length", "unit_sequences", "packing", "seed")


def is_decision(row: dict[str, Any]) -> bool:
    """Whether a row of the log is a step, not a segment."""
    return "draws" in row


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's log.

    Raises:
        UserError: there is no log, or none that says what it was decided by.
    """
    rows = read_jsonl(run / "mixing.jsonl")
    if not rows:
        raise UserError(f"{run}: no decisions in {run / 'mixing.jsonl'}; name the folder of a run that has trained.")
    if is_decision(rows[0]):
        raise UserError(f"{run}: its mixing.jsonl was written by an older version, which did not say what the decisions were made by.")
    return rows


@dataclass(frozen=True)
class Segment:
    """A stretch of a log: what it was decided by, and its steps."""

    decided_by: dict[str, Any]
    rows: list[dict[str, Any]]


def segments(rows: list[dict[str, Any]]) -> Iterator[Segment]:
    """The log's stretches. Of several segment rows in front of the same step the last one holds."""
    head: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = []
    for row in rows:
        if is_decision(row):
            steps.append(row)
            continue
        if steps and head:
            yield Segment(head, steps)
            steps = []
        head = row
    if steps and head:
        yield Segment(head, steps)


def losses_of(row: dict[str, Any]) -> dict[int, float]:
    """A decision's losses by domain; what was not finite is written as null, and comes back as NaN."""
    return {int(domain): math.nan if loss is None else loss for domain, loss in (row["losses"] or {}).items()}


class Script:
    """Another run's decisions, to be followed step by step.

    `places` [K] are the other run's numbers of this run's domains.
    """

    def __init__(self, run: Path, rows: dict[int, dict[str, Any]], places: list[int]) -> None:
        self.run, self.rows, self.places = run, rows, places

    @classmethod
    def open(cls, run: Path, segment: dict[str, Any]) -> "Script":
        """The decisions of a run, for a loader whose own segment is given.

        Raises:
            UserError: the other run read other data, or read it in another order; the difference is named.
        """
        rows: dict[int, dict[str, Any]] = {}
        mine = segment["identity"]
        for stretch in segments(read_log(run)):
            theirs = stretch.decided_by["identity"]
            told = [f"{key}: {theirs[key]!r} there, {mine[key]!r} here" for key in _SHARED if theirs[key] != mine[key]]
            told += [f"global_batch: {batch} there, {segment['loader']['global_batch']} here"
                     for batch in [stretch.decided_by["loader"]["global_batch"]] if batch != segment["loader"]["global_batch"]]  # fmt: skip
            if theirs["domains"] != mine["domains"]:
                told.append(f"domains: {_difference(theirs['domains'], mine['domains'])}")
            if told:
                raise UserError(f"mixing.replay_log = {run}: its decisions cannot be followed on this run's data ({'; '.join(told)}).")
            rows |= {row["step"]: row for row in stretch.rows}
            places = [stretch.decided_by["domains"].index(domain) for domain in segment["domains"]]
        return cls(run, rows, places)

    def row(self, step: int) -> dict[str, Any]:
        """The decision of a step.

        Raises:
            Exhausted: the log has none.
        """
        if step not in self.rows:
            remedy = (
                f"Set run.steps to at most {max(self.rows) + 1}, or finish that run first."
                if step > max(self.rows)
                else "Its log is not whole."
            )
            raise Exhausted(
                f"mixing.replay_log = {self.run}: its log has no step {step} (it has {min(self.rows)} to {max(self.rows)}). {remedy}"
            )
        return self.rows[step]


def _difference(theirs: dict[str, str], mine: dict[str, str]) -> str:
    only = [*(f"{d} only there" for d in theirs if d not in mine), *(f"{d} only here" for d in mine if d not in theirs)]
    return ", ".join([*only, *(f"{d} has other shards" for d in mine if d in theirs and mine[d] != theirs[d])])
