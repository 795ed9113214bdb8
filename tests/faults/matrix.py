"""The fault matrix: what is done to whom in which moment of a run, and what has to come of it."""

from dataclasses import dataclass
from itertools import product

WHO = {"0": "rank 0", "1": "another rank", "launcher": "the launcher", "data": "another rank's data thread", "machine": "the machine"}
# (phase as a rank's sign names it, step) of a run with a growth at 6, checkpoints every 4 and evaluations every 5 steps
WHEN = {
    "start": ("startup", 0),
    "forward": ("forward and backward", 9),
    "optimizer step": ("update", 9),
    "checkpoint write": ("checkpoint", 8),
    "growth": ("growth", 6),
    "evaluation": ("evaluation", 10),
}
RANK_FAULTS = ("kill -9", "SIGSTOP", "SIGTERM", "slow", "exception", "exit code 1")
LAUNCHER_FAULTS = ("kill -9", "SIGSTOP", "SIGTERM")
DATA_FAULTS = ("slow", "stuck", "exception")  # signals and exit codes come to the whole rank

UNDISTURBED, GOES_ON, STOPS, TOLD = "nothing", "goes on by itself", "stops with a checkpoint", "is told at once"
RESUMED = "goes on when resumed"


@dataclass(frozen=True)
class Cell:
    """One fault."""

    what: str
    who: str
    when: str

    def __str__(self) -> str:
        return f"{self.what}, {WHO[self.who]}, {self.when}"

    @property
    def outcome(self) -> str:
        """What has to come of it. After all but the first two, `regrowth train --resume` goes on; the numbers are always those of the undisturbed run."""
        if self.what == "slow" or (self.who == "launcher" and self.what == "SIGSTOP"):
            return UNDISTURBED
        if self.what == "power cut":
            return RESUMED
        if self.who == "data":  # the batches that a growth finds built are thrown away, whatever came of them
            return UNDISTURBED if (self.what, self.when) == ("exception", "growth") else TOLD if self.when == "start" else GOES_ON
        if self.who == "launcher":  # its ranks are told by the kernel when it dies
            return STOPS
        if self.what == "SIGTERM":  # before a rank listens, it dies of it
            return GOES_ON if self.when == "start" else STOPS
        if self.what == "exception" and (self.when in ("start", "checkpoint write") or (self.when, self.who) == ("growth", "0")):
            return TOLD
        return GOES_ON


CELLS = [
    *(Cell(what, who, when) for what, who, when in product(RANK_FAULTS, ("0", "1"), WHEN)),
    *(Cell(what, "launcher", when) for what, when in product(LAUNCHER_FAULTS, WHEN)),
    *(Cell(what, "data", when) for what, when in product(DATA_FAULTS, WHEN)),
    *(Cell("power cut", "machine", when) for when in WHEN),
]


def table() -> str:
    """The matrix as the documentation shows it."""
    lines = ["| what | to whom | " + " | ".join(WHEN) + " |", "|---" * (len(WHEN) + 2) + "|"]
    for what, who in dict.fromkeys((cell.what, cell.who) for cell in CELLS):
        lines.append(f"| {what} | {WHO[who]} | " + " | ".join(Cell(what, who, when).outcome for when in WHEN) + " |")
    return "\n".join(lines)
