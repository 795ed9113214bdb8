"""Whether a run's ranks hang: no rank has begun anything new for much longer than steps of this run take.

Signs are compared with the ones before by this process's own steady clock, so a clock that jumps on any host is no hang.
"""

import time
from collections import deque
from pathlib import Path

import numpy as np

from regrowth.launch.watch import LogTail
from regrowth.parallel.heartbeat import PULSED, Beat, beats
from regrowth.pretrain.config import RunConfig

_LEAST_SECONDS, _LEAST_COMPILED, _TIMES = 30.0, 300.0, 5.0  # with compilation, a step of a new shape takes minutes
_LOOKING = 2.0  # looking once a second and taking the stacks, so that a hang is told within the limit
_AFTER_THEIR_OWN = 10.0  # seconds for ranks that gave up by themselves to say for whom they waited, which tells more
_FILES_A_SECOND = 1000  # that one process reads of a shared file system
_PULSE_LOST = 60.0  # seconds without the sign that is due each second
_SETTLED = 10  # steps after a start or a growth from which on their times say what is usual


class Hanging:
    """Asked as often as one likes; looks once a second, less often at thousands of ranks. Returns a sentence if the ranks hang.

    A step's phase may last `supervision.hang_seconds`, by default `max(30 s, 5 x the 99th percentile of steps)`, or `run.timeout_seconds` as long as there are too few of them;
    a batch of an evaluation and a checkpoint may last `run.timeout_seconds`; a growth, and loading a checkpoint, as long as each rank's process gives its sign.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder / "logs", config
        self.steps = LogTail(folder / "metrics.jsonl")
        self.seconds: deque[float] = deque(maxlen=1000)  # since the start, or the last growth
        self._stepped = False
        self.known = {beat.rank: beat for beat in beats(self.folder)}  # of an earlier start
        self.changed_at = self.looked_at = time.monotonic()
        self.heard: dict[int, float] = {}  # when each rank of this start was

    def __call__(self) -> str | None:
        """The sentence, or None."""
        now = time.monotonic()
        if now - self.looked_at < max(1.0, len(self.known) / _FILES_A_SECOND):
            return None
        self.looked_at = now
        self._read()
        found = {beat.rank: beat for beat in beats(self.folder)}
        self.heard |= {rank: now for rank, beat in found.items() if beat != self.known.get(rank)}
        if found != self.known:
            self.known, self.changed_at = found, now
            if any(beat.phase == "growth" for beat in found.values()):
                self.seconds.clear()
        here = [beat for rank, beat in found.items() if rank in self.heard]
        if stopped := [beat for beat in here if beat.phase in PULSED and now - self.heard[beat.rank] > self.pulse_limit(beat)]:
            silent = now - max(self.heard[beat.rank] for beat in stopped)
            return f"hung: {_where(stopped)} gave no sign for {silent:.0f} s, where one is due each second."
        silent = now - self.changed_at
        if not here or silent <= (limit := self.limit(here)):
            return None
        return f"hung: no rank did anything for {silent:.0f} s, where {limit:.0f} s are usual at most ({_where(here)})."

    @property
    def stepped(self) -> bool:
        """Whether this start has done a step."""
        self._read()
        return self._stepped

    def _read(self) -> None:
        self.steps.skip_what_was_rewound()
        new = [row["seconds"] for row in self.steps.new_rows()]
        self.seconds += new
        self._stepped |= bool(new)

    def pulse_limit(self, beat: Beat) -> float:
        """Seconds without a sign after which a process that should give one each second is taken to be stopped; importing may hold it up for long."""
        most = self.config.run.timeout_seconds
        return most if beat.phase == "startup" else min(most, self.config.supervision.hang_seconds or _PULSE_LOST)

    def limit(self, here: list[Beat]) -> float:
        """Seconds in which no rank may have begun anything new, of ranks at these places."""
        most = self.config.run.timeout_seconds + _AFTER_THEIR_OWN
        if {beat.phase for beat in here} & {"evaluation", "checkpoint", *PULSED} or len(self.seconds) < _SETTLED:
            return most
        if self.config.supervision.hang_seconds:
            return self.config.supervision.hang_seconds
        least = _LEAST_COMPILED if self.config.parallel.compile else _LEAST_SECONDS
        return min(most, max(least, _TIMES * float(np.percentile(self.seconds, 99))) - _LOOKING)


def _where(beats: list[Beat]) -> str:
    told = (f'rank {b.rank} on {b.host}: step {b.step}, "{b.phase}"' for b in sorted(beats, key=lambda b: (b.step, b.rank))[:4])
    return "; ".join(told) + (" ..." if len(beats) > 4 else "")
