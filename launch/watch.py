"""The live line of a run, read from its logs: whoever starts or joins a run sees the same."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class LogTail:
    """Rows that were appended to a jsonl file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, path.stat().st_size if path.exists() else 0

    def skip_what_was_rewound(self) -> None:
        """If rows were taken back since the last look, those that are left are no news."""
        size = self.path.stat().st_size if self.path.exists() else 0
        self.offset = min(self.offset, size)

    def new_rows(self) -> list[dict[str, Any]]:
        """Whole new lines, parsed."""
        if not self.path.exists():
            return []
        size = self.path.stat().st_size
        if size < self.offset:  # rewound on resume
            self.offset = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(size - self.offset)
        whole = data.rfind(b"\n") + 1
        self.offset += whole
        rows = []
        for line in data[:whole].splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows


class Watch:
    """Shows progress: a live panel on a terminal, a line now and then elsewhere. Call it often; call it with True at the end."""

    def __init__(self, folder: Path, steps: int, console: Console) -> None:
        self.console, self.steps = console, steps
        self.tails = {name: LogTail(folder / f"{name}.jsonl") for name in ("metrics", "events", "evaluations")}
        self.last: dict[str, Any] | None = None
        self.bits: dict[str, Any] | None = None
        self.recent: list[float] = []
        self.told_at = 0.0
        self.progress = Progress(TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
        self.bar = self.progress.add_task("training", total=steps)
        self.live = Live(self._panel(), console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        if self.live:
            self.live.start()

    def __call__(self, finished: bool) -> None:
        """Read the logs and show what is new."""
        for event in self.tails["events"].new_rows():
            self._tell(_spell_event(event))
        for row in self.tails["evaluations"].new_rows():
            self.bits = row
            shown = "  ".join(f"{d} {s['bits_per_byte']:.3f}" for d, s in row["domains"].items())
            self._tell(f"step {row['step']:>6}  held-out bits per byte {row['bits_per_byte']:.3f}   {shown}  {row['note']}".rstrip())
        rows = self.tails["metrics"].new_rows()
        for row in rows:
            self.recent = [*self.recent[-19:], row["seconds"]]
            self.last = row
        if self.live:
            if self.last:
                self.progress.update(self.bar, completed=self.last["step"] + 1)
            self.live.update(self._panel())
            if finished:
                self.live.stop()
        elif self.last and rows and (finished or time.monotonic() - self.told_at > 15):
            self.told_at = time.monotonic()
            self.console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live:
            self.live.stop()

    def _tell(self, line: str | None) -> None:
        if line:
            self.console.print(Text(line, style="dim"), soft_wrap=True)

    def _eta(self) -> str:
        assert self.last
        seconds = (self.steps - self.last["step"] - 1) * sum(self.recent) / max(1, len(self.recent))
        return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"

    def _figures(self) -> list[tuple[str, str]]:
        row = self.last
        assert row
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        figures = [
            ("loss", loss),
            ("tokens/s", f"{row['tokens_per_second']:,.0f}"),
            ("lr", f"{row['lr']:.2e}"),
            ("layers", str(row["layers"])),
        ]
        figures += [("MFU", f"{row['mfu']:.1%}")] if row.get("mfu") else []
        figures += [("precision", row["precision"]), ("left", self._eta())]
        figures += [("bits/byte", f"{self.bits['bits_per_byte']:.3f}")] if self.bits else []
        return figures

    def _line(self) -> str:
        assert self.last
        mixture = " ".join(f"{d} {p:.2f}" for d, p in self.last["mixture"].items())
        return (
            f"step {self.last['step'] + 1:>6}/{self.steps}  " + "  ".join(f"{k} {v}" for k, v in self._figures()) + f"  mixture {mixture}"
        )

    def _panel(self) -> Group:
        if not self.last:
            return Group(self.progress, Text("starting the ranks ...", style="dim"))
        table = Table.grid(padding=(0, 2))
        figures = self._figures()
        table.add_row(*(Text(name, style="dim") for name, _ in figures))
        table.add_row(*(Text(value, style="bold") for _, value in figures))
        bars = Text("mixture  ", style="dim")
        for number, (domain, share) in enumerate(self.last["mixture"].items()):
            colour = ("blue", "red", "green", "magenta", "yellow", "cyan")[number % 6]
            bars.append("█" * round(share * 30), style=colour)
            bars.append(f" {domain} {share:.2f}  ")
        return Group(self.progress, table, bars)


def _spell_event(event: dict[str, Any]) -> str | None:
    step = f"step {event.get('step', 0):>6}  "
    match event["event"]:
        case "growth":
            return (
                f"{step}grown ({event['op']}): {event['layers'][0]} -> {event['layers'][1]} layers, {event['parameters'][1]:,} parameters"
            )
        case "precision":
            return f"{step}precision {event['recipe']}"
        case "linears stay wide":
            return f"{step}{len(event['gains'])} linears stay wide: {event['reason']}"
        case "scales begin anew":
            return f"{step}scales begin anew: {event['reason']}"
        case "linear goes wide":
            return f"{step}{event['linear']} goes wide: its error of rounding is {max(event['errors'].values()):.0%}"
        case "checkpoint refused":
            return f"{event['reason']} Used instead: {event['used']}."
        case "resumed":
            return f"{step}resumed from {event['checkpoint'] or 'the start'}"
        case "straggler":
            return f"{step}rank {event['rank']} on {event['host']} is slow: {event['what']} takes it {event['times']} times as long as the others"
        case "fewer replicas":
            return f"going on with {event['nodes']} of {event['of']} nodes, with fewer data-parallel ranks"
        case "skipped step":
            return f"{step}{event['reason']}"
        case _:
            return None
