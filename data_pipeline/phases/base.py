"""A phase: numbered tasks, each done when its record stands, which is written last; and the gate behind it.

    phases/0-curate/part-00007.json      the record of task 7: what it counted, when it ended
    phases/0-curate/part-00007.failed    why task 7 failed, if it did
    phases/0-curate/complete.json        the gate: everything is done, or the named tasks were given up

Whoever runs the tasks (this process, local workers, MPI ranks, array tasks of Slurm) calls `run_task`; nothing else is agreed on between them,
so a process can be killed at any moment and its task is simply done again.
"""

import collections
import contextlib
import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.document import DROPPED
from regrowth.errors import RegrowthError, RunFailed, Stopped
from regrowth.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from regrowth.data_pipeline.pipeline import Pipeline

# (domain, transform, reason) -> documents, bytes. The reason "" counts what the transform let through.
Funnel = dict[tuple[str, str, str], tuple[int, int]]
OnDrop = Callable[[pa.RecordBatch], None]


def new_funnel() -> Funnel:
    """An empty funnel."""
    return collections.defaultdict(lambda: (0, 0))


def count(funnel: Funnel, batch: pa.RecordBatch, transform: str, reason: str) -> None:
    """Add a batch's documents and text bytes to the funnel, by domain."""
    if not len(batch):
        return
    table = pa.table({"domain": batch.column("domain"), "bytes": pc.binary_length(batch.column("text"))})
    for row in table.group_by("domain").aggregate([("bytes", "sum"), ("bytes", "count")]).to_pylist():
        documents, bytes_ = funnel[(row["domain"], transform, reason)]
        funnel[(row["domain"], transform, reason)] = (documents + row["bytes_count"], bytes_ + row["bytes_sum"])


def count_dropped(funnel: Funnel, batch: pa.RecordBatch) -> None:
    """Add a batch of dropped documents, all of one transform, to the funnel by domain and reason."""
    for reason in pc.unique(batch.column("reason")).to_pylist():
        count(funnel, batch.filter(pc.equal(batch.column("reason"), reason)), batch.column("transform")[0].as_py(), reason)


def add_funnel(total: Funnel, rows: Iterable[list[Any]]) -> None:
    """Add a record's funnel rows to a funnel."""
    for domain, transform, reason, documents, bytes_ in rows:
        before = total[(domain, transform, reason)]
        total[(domain, transform, reason)] = (before[0] + documents, before[1] + bytes_)


def funnel_rows(funnel: Funnel) -> list[list[Any]]:
    """A funnel as JSON-able rows."""
    return [[*key, *value] for key, value in sorted(funnel.items())]


class Phase:
    """Base of the phases."""

    kind = "phase"
    single = False  # whether it is always one task
    may_lose = False  # whether single tasks may be given up (executor.max_failed)

    def __init__(self, pipeline: "Pipeline", number: int) -> None:
        self.pipeline = pipeline
        self.name = f"{number}-{self.kind}"
        self.folder = pipeline.root / "phases" / self.name

    def sizes(self) -> list[int]:
        """How large each task is, in bytes or what comes near; its length is the number of tasks. Earlier phases are complete."""
        if self.single:
            return [1]
        raise NotImplementedError

    def run(self, task: int) -> dict[str, Any]:
        """Do one task and return what its record says."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of what this process holds for the phase's tasks; it has done its share."""

    @cached_property
    def task_sizes(self) -> list[int]:
        """`sizes`, asked once."""
        return self.sizes()

    def path(self, task: int, suffix: str) -> Path:
        """A file of one task."""
        return self.folder / f"part-{task:05d}{suffix}"

    def done(self, task: int) -> bool:
        """Whether a task's record stands."""
        return self.path(task, ".json").exists()

    def pending(self) -> list[int]:
        """The tasks that are not done, in order."""
        finished = set() if not self.folder.exists() else {p.name for p in self.folder.iterdir() if p.suffix == ".json"}
        return [task for task in range(len(self.task_sizes)) if f"part-{task:05d}.json" not in finished]

    def record(self, task: int) -> dict[str, Any]:
        """What a finished task wrote down."""
        return read_json(self.path(task, ".json"))

    def run_task(self, task: int) -> None:
        """Do one task unless it is done; on failure its letter is kept beside it.

        Raises:
            RegrowthError: the task failed.
        """
        if self.done(task):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f".part-{task:05d}.*partial-*"):  # of a process that was killed
            with contextlib.suppress(OSError):
                stale.unlink()
        begin = time.time()
        try:
            record = self.run(task)
        except Stopped:  # no failure of the task's
            raise
        except Exception as error:
            letter = str(error) if isinstance(error, RegrowthError) else f"{type(error).__name__}: {error}"
            self.fail(task, letter)
            raise
        write_json(self.path(task, ".json"), {**record, "begin": begin, "end": time.time()})
        self.path(task, ".failed").unlink(missing_ok=True)

    def fail(self, task: int, letter: str) -> None:
        """Note beside a task why it failed."""
        write_json(self.path(task, ".failed"), {"task": task, "letter": letter, "at": time.time()})

    @contextlib.contextmanager
    def dropping(self, task: int, funnel: Funnel) -> Iterator[OnDrop]:
        """Inside, what is handed to the function is kept among the dropped documents, under this task's name, and counted."""
        with (
            atomic_path(self.pipeline.root / "dropped" / f"{self.name}-{task:05d}.arrow") as partial,
            pa.ipc.new_stream(str(partial), DROPPED) as writer,
        ):

            def drop(batch: pa.RecordBatch) -> None:
                if len(batch):
                    writer.write_batch(batch)
                    count_dropped(funnel, batch)

            yield drop

    @property
    def settled(self) -> bool:
        """Whether the gate has been passed."""
        return (self.folder / "complete.json").exists()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the gate wrote down: the tasks given up; documents and bytes by task; when the first began and the last ended.

        One file, where the records may be ten thousand.
        """
        return read_json(self.folder / "complete.json")

    @cached_property
    def missing(self) -> set[int]:
        """The tasks that were given up. Only to be asked behind the gate."""
        return set(self.summary["missing"])

    def settle(self, max_failed: int) -> None:
        """Pass the gate: all tasks are done, or few enough are given up.

        Raises:
            RunFailed: too many are not; the letter names the first ones and why they failed.
        """
        if self.settled:
            return
        left = self.pending()
        if left and (not self.may_lose or len(left) > max_failed):
            raise RunFailed(self.letter(left, max_failed))
        gone = set(left)
        records = [{} if task in gone else self.record(task) for task in range(len(self.task_sizes))]
        summary = {
            "missing": left,
            "letters": [self.failure(task) for task in left],
            "documents": [record.get("documents", 0) for record in records],
            "bytes": [record.get("bytes", 0) for record in records],
            "begin": min((record["begin"] for record in records if record), default=0.0),
            "end": max((record["end"] for record in records if record), default=0.0),
        }
        write_json(self.folder / "complete.json", summary)

    def failure(self, task: int) -> str:
        """Why a task is not done."""
        path = self.path(task, ".failed")
        return read_json(path)["letter"] if path.exists() else "it was never begun, or its process was killed"

    def letter(self, left: list[int], max_failed: int) -> str:
        """The letter about tasks that are not done."""
        told = sorted(left, key=lambda task: not self.path(task, ".failed").exists())  # those that say why come first
        shown = "; ".join(f"task {task}: {self.failure(task)}" for task in told[:3])
        more = f" (and {len(left) - 3} more)" if len(left) > 3 else ""
        allowed = f" executor.max_failed allows {max_failed}." if self.may_lose else ""
        return (f"{self.folder}: {len(left)} of {len(self.task_sizes)} tasks are not done.{allowed} {shown}{more}. What is done is kept; "
                "run the same command again to go on with the rest.")  # fmt: skip


def assigned(sizes: list[int], tasks: list[int], rank: int, world_size: int) -> list[int]:
    """Which of `tasks` are this rank's: the largest first, each to the rank with the least so far. Every rank computes the same."""
    loads = [(0, r) for r in range(world_size)]
    mine = []
    for task in sorted(tasks, key=lambda t: (-sizes[t], t)):
        load, owner = heapq.heappop(loads)
        heapq.heappush(loads, (load + max(sizes[task], 1), owner))
        if owner == rank:
            mine.append(task)
    return mine
