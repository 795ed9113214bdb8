"""How far a corpus is, told from its records alone: any shell on any machine that sees the folder can ask."""

import time
from dataclasses import dataclass

from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.files import read_json


@dataclass(frozen=True)
class PhaseStatus:
    """One phase. `total` is None while the phases before it are not settled: its tasks are not known yet."""

    name: str
    done: int
    total: int | None
    failed: list[str]  # letters of tasks that failed last time and are not done since
    documents: int
    bytes: int  # of text that the done tasks wrote
    bytes_per_second: float
    seconds_left: float | None
    settled: bool
    given_up: int


def corpus_status(pipeline: Pipeline) -> list[PhaseStatus]:
    """The phases in order."""
    statuses, open_ = [], True
    for phase in pipeline.phases:
        if not open_:
            statuses.append(PhaseStatus(phase.name, 0, None, [], 0, 0, 0.0, None, False, 0))
            continue
        sizes = phase.task_sizes
        pending = set(phase.pending())
        done = [task for task in range(len(sizes)) if task not in pending]
        records = [phase.record(task) for task in done]
        failed = [read_json(path)["letter"] for path in sorted(phase.folder.glob("part-*.failed"))] if phase.folder.exists() else []
        settled = phase.settled
        finished = sum(sizes[task] for task in done)
        begin = min((record["begin"] for record in records), default=0.0)
        span = max((record["end"] for record in records), default=0.0) - begin if settled else time.time() - begin
        left = (sum(sizes) - finished) * span / finished if finished and not settled else None
        bytes_ = sum(record.get("bytes", 0) for record in records)
        statuses.append(
            PhaseStatus(
                phase.name,
                len(done),
                len(sizes),
                failed,
                sum(record.get("documents", 0) for record in records),
                bytes_,
                bytes_ / span if span > 0 else 0.0,
                left,
                settled,
                len(phase.missing) if settled else 0,
            )
        )
        open_ = settled
    return statuses
