"""A run's logs as one: those of all ranks and the run's events, in the order of time, the first error on top."""

import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from regrowth.errors import UserError
from regrowth.launch.local import letters
from regrowth.launch.place import ALIVE, place_of, state_of
from regrowth.launch.slurm import queued
from regrowth.launch.watch import LogTail
from regrowth.pretrain.run_folder import RunFolder

_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4}) ?")
_ALL_TAILS = 64 << 20  # bytes that are read of all logs together, from their ends
_LINE = 4000  # characters that are shown of a line


class Line(NamedTuple):
    """A line of a log."""

    time: float
    who: str
    text: str


class RankLog:
    """One rank's log, read on from where the last reading ended."""

    def __init__(self, path: Path, tail: int) -> None:
        self.path, self.who = path, path.stem.replace("-", " ")
        self.offset, self.time = max(0, path.stat().st_size - tail), 0.0
        self.cut = self.offset > 0

    def new_lines(self) -> list[Line]:
        """What was added since. A line without a time of its own, as of native code, has that of the one before it."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self.offset += whole
        found = []
        for raw in data[:whole].split(b"\n")[int(self.cut) : -1]:
            text = raw.decode("utf-8", "replace")
            if stamp := _STAMP.match(text):
                self.time, text = datetime.strptime(stamp[1], "%Y-%m-%dT%H:%M:%S.%f%z").timestamp(), text[stamp.end() :]
            found.append(Line(self.time, self.who, text))
        self.cut = False
        return found


class MergedLogs:
    """All logs of a run, or those of some ranks."""

    def __init__(self, run: RunFolder, ranks: list[int]) -> None:
        self.run, self.ranks = run, ranks
        self.events = LogTail(run.path / "events.jsonl")
        self.events.offset = 0
        self.logs: dict[Path, RankLog] = {}

    def new_lines(self) -> list[Line]:
        """What was added since the last call, by time."""
        paths = [
            p for p in (self.run.path / "logs").glob("rank-*.log") if not self.ranks or int(p.stem.removeprefix("rank-")) in self.ranks
        ]
        for path in paths:
            self.logs.setdefault(path, RankLog(path, _ALL_TAILS // max(1, len(paths))))
        lines = [line for log in self.logs.values() for line in log.new_lines()]
        for event in self.events.new_rows():
            told = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "time") and value not in (None, ""))
            lines.append(Line(float(event.get("time", 0.0)), "run", f"{event['event']}{f': {told}' if told else ''}"))
        return sorted(lines, key=lambda line: line.time)  # stable: lines of one moment stay as they were


def show_logs(folder: Path, ranks: list[int], last: int, follow: bool) -> None:
    """The `launch logs` command.

    Raises:
        UserError: a rank that the run does not have.
    """
    run, console = RunFolder.open(folder), Console(highlight=False)
    known = sorted(int(path.stem.removeprefix("rank-")) for path in (run.path / "logs").glob("rank-*.log"))
    if missing := [rank for rank in ranks if rank not in known]:
        raise UserError(f"{run.path}: no log of rank {missing[0]}; there are those of {_spans(known) or 'none'}.")
    own = [letter for letter in letters(run.path) if not letter.echo]
    if own:
        first = min(own, key=lambda letter: letter.time)
        console.print(
            Text(f"first error of the last start: rank {first.rank}, {_clock(first.time)}: {first.message}", "bold red"), soft_wrap=True
        )
    merged = MergedLogs(run, ranks)
    lines = merged.new_lines()
    for line in lines[-last:] if last else lines:
        _print(console, line)
    for line in _followed(run, merged) if follow else ():
        _print(console, line)


def _followed(run: RunFolder, merged: MergedLogs) -> Iterator[Line]:
    place = place_of(run)
    while True:
        alive = state_of(run, queued([place.job] if place and place.job else []))[0] in ALIVE
        yield from merged.new_lines()
        if not alive:
            return
        time.sleep(5.0 if place and place.job else 0.5)  # a scheduler is not asked all the time


def _print(console: Console, line: Line) -> None:
    style = "bold" if line.who == "run" else "red" if "Error" in line.text else ""
    console.print(Text.assemble((f"{_clock(line.time)} {line.who:<7} ", "dim"), (line.text[:_LINE], style)), soft_wrap=True)


def _clock(when: float) -> str:
    return f"{time.strftime('%m-%d %H:%M:%S', time.localtime(when))}.{int(when % 1 * 1000):03d}" if when else " " * 18


def _spans(numbers: list[int]) -> str:
    """1, 2, 3, 5 as "1-3, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
