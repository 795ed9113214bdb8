"""Where a step goes: a torch profiler trace of some steps, a table by kind of work, and on a GPU a snapshot of its memory.

run/profile/table.txt   trace-rank-0.json (chrome://tracing, Perfetto)   memory-rank-0.pickle (pytorch.org/memory_viz)
"""

import io
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from regrowth.files import write_text
from regrowth.pretrain.config import RunSettings

# The first of these that is part of an operator's name says what kind of work it is.
_KINDS = {
    "communication": (
        "c10d::",
        "gloo:",
        "nccl",
        "all_reduce",
        "allreduce",
        "all_gather",
        "allgather",
        "reduce_scatter",
        "all_to_all",
        "send",
        "recv",
    ),
    "attention": ("attention", "flex", "flash"),
    "matrix products": ("mm", "linear", "matmul", "gemm"),
    "optimizer": ("adam", "foreach", "clip_grad"),
    "loss": ("CrossEntropy", "log_softmax", "logsumexp"),
    "norms": ("norm",),
    "copies": ("copy", "clone", "contiguous", "_to_copy", "cat", "stack", "index", "gather", "scatter", "embedding"),
}


class Profile:
    """Profiles `run.profile_steps` steps from `run.profile_from` on; otherwise does nothing. Every rank writes its own trace, rank 0 the table."""

    def __init__(self, settings: RunSettings, folder: Path, rank: int, device: torch.device) -> None:
        self.first, self.count = settings.profile_from, settings.profile_steps
        self.folder, self.rank, self.device = folder / "profile", rank, device
        self._profiler: Any = None

    def __enter__(self) -> Self:
        if self.first == 0:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._stop(0)

    def step(self, done: int) -> None:
        """Called when `done` steps are done."""
        if self.first is None:
            return
        if self._profiler is not None and done >= self.first + self.count:
            self._stop(self.count)
            self.first = None
        elif self._profiler is None and done == self.first:
            self._start()

    def _start(self) -> None:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profiler = profile(activities=activities, profile_memory=True)
        self._profiler.start()

    def _stop(self, steps: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"trace-rank-{self.rank}.json"))
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank-{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self.rank == 0 and steps:
            write_text(self.folder / "table.txt", summary(profiler, steps, self.device))


def kind_of(operator: str) -> str:
    """What kind of work an operator of a trace is."""
    return next((kind for kind, signs in _KINDS.items() if any(sign in operator for sign in signs)), "elementwise and other")


def summary(profiler: Any, steps: int, device: torch.device) -> str:
    """The table: time per step by kind of work, then the costliest operators."""
    cuda = device.type == "cuda"
    rows = [(e.key, float(e.self_device_time_total if cuda else e.self_cpu_time_total), e.count) for e in profiler.key_averages()]
    total = sum(time for _, time, _ in rows) or 1.0
    kinds: dict[str, float] = {}
    for name, time, _ in rows:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + time
    by_kind = Table("work", "ms per step", "share", title=f"where a step goes ({'GPU' if cuda else 'CPU'} time, {steps} steps)")
    for kind, time in sorted(kinds.items(), key=lambda item: -item[1]):
        by_kind.add_row(kind, f"{time / 1e3 / steps:.2f}", f"{time / total:.1%}")
    by_operator = Table("operator", "ms per step", "share", "calls per step", title="the costliest operators")
    for name, time, count in sorted(rows, key=lambda row: -row[1])[:20]:
        by_operator.add_row(name[:70], f"{time / 1e3 / steps:.2f}", f"{time / total:.1%}", f"{count / steps:.0f}")
    text = io.StringIO()
    Console(width=120, file=text).print(by_kind, by_operator, sep="\n")
    return text.getvalue()
