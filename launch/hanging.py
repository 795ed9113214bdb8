"""Whether a run's ranks hang: no rank has begun anything new for much longer than steps of this run take.

Signs are compared with the ones before by this process's own steady clock, so a clock that jumps on any host is no hang.
"""

import time
from collections import deque
from pathlib import Path

import numpy as np

from regrowth.launch.watch import LogTail
from regrowth.parallel.heartbeat import Beat, beats
from regrowth.pretrain.config import RunConfig

_LEAST_SECONDS, _LEAST_COMPILED, _TIMES = 30.0, 300.0, 5.0  # with compilation, a step of a new shape takes minutes
_LOOKING = 2.0  # looking once a second and taking the stacks, so that a hang is told within the limit
_AFTER_THEIR_OWN = 10.0  # seconds for ranks that gave up by themselves to say for whom they waited, which tells more
_SETTLED = 10  # steps after a start or a growth from which on their times say what is usual


class Hanging:
    """Asked as often as one likes; looks once a second. Returns a sentence if the ranks hang.

    A step's phase may last `supervision.hang_seconds`, by default `max(30 s, 5 x the 99th percentile of steps)`, or `run.timeout_seconds` as long as there are too few of them; a batch of an evaluation, a
    checkpoint and waiting for data may last `run.timeout_seconds`; a growth, and loading a checkpoint, as long as they take.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder / "logs", config
        self.steps = LogTail(folder / "metrics.jsonl")
        self.seconds: deque[float] = deque(maxlen=1000)
        self.known = {beat.rank: beat for beat in beats(self.folder)}  # of an earlier start
        self.old = dict(self.known)
        self.changed_at = self.looked_at = time.monotonic()

    def __call__(self) -> str | None:
        """The sentence, or None."""
        now = time.monotonic()
        if now - self.looked_at < 1.0:
            return None
        self.looked_at = now
        self.seconds += [row["seconds"] for row in self.steps.new_rows()]
        found = {beat.rank: beat for beat in beats(self.folder)}
        if found != self.known:
            self.known, self.changed_at = found, now
            if any(beat.phase == "growth" for beat in found.values()):
                self.seconds.clear()
        here = [beat for rank, beat in found.items() if beat != self.old.get(rank)]
        silent = now - self.changed_at
        if not here or (limit := self.limit(here)) is None or silent <= limit:
            return None
        where = "; ".join(
            f'rank {b.rank} on {b.host}: step {b.step}, "{b.phase}"' for b in sorted(here, key=lambda b: (b.step, b.rank))[:4]
        )
        return f"hung: no rank did anything for {silent:.0f} s, where {limit:.0f} s are usual at most ({where}{' ...' if len(here) > 4 else ''})."

    @property
    def stepped(self) -> bool:
        """Whether this start has done a step."""
        self.seconds += [row["seconds"] for row in self.steps.new_rows()]
        return bool(self.seconds) or any(beat != self.old.get(rank) and beat.phase == "growth" for rank, beat in self.known.items())

    def limit(self, here: list[Beat]) -> float | None:
        """Seconds of silence that are still usual, of ranks at these places; None: any."""
        phases = {beat.phase for beat in here}
        if phases & {"growth", "loading"}:
            return None
        most = self.config.run.timeout_seconds + _AFTER_THEIR_OWN
        if phases & {"evaluation", "checkpoint", "data"} or len(self.seconds) < _SETTLED:
            return most
        if self.config.supervision.hang_seconds:
            return self.config.supervision.hang_seconds
        least = _LEAST_COMPILED if self.config.parallel.compile else _LEAST_SECONDS
        return min(most, max(least, _TIMES * float(np.percentile(self.seconds, 99))) - _LOOKING)
