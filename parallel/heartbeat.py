"""Where every rank is: one small file each, so that when a collective times out its letter can say whom everybody waited for."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

# Signs of a collective that did not come about, in the words of gloo, NCCL and c10d.
_TIMEOUT = ("Timed out", "timed out", "Timeout", "timeout")
SIGNS_OF_A_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted")
_PULSE_SECONDS = 1.0
# Of a step, in their order; the first five are of the moment before it.
Phase = Literal["startup", "loading", "evaluation", "checkpoint", "growth", "data", "forward and backward", "update"]
PULSED = ("startup", "loading", "growth")  # as long as files are large: while they last, a living process gives its sign again and again
_PHASES: tuple[str, ...] = get_args(Phase)


@dataclass(frozen=True)
class Beat:
    """The last sign of a rank."""

    rank: int
    step: int
    phase: str
    time: float
    host: str


class Heartbeat:
    """This rank's sign of life; `beat` costs a write of some bytes. In a pulsed phase a thread gives it each second, until the next one or `close`."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._at: tuple[int, Phase] | None = None
        self._thread: threading.Thread | None = None
        self._changing = threading.Lock()
        self.rank, self._file = rank, (folder / f"rank-{rank}.beat").open("wb", buffering=0)
        self._host = socket.gethostname()
        if rank == 0:  # of an earlier start with more ranks
            for path in folder.glob("rank-*.beat"):
                if int(path.stem.removeprefix("rank-")) >= world_size:
                    path.unlink(missing_ok=True)

    def beat(self, step: int, phase: Phase, seen_from_afar: bool = False) -> None:
        """Say what this rank begins to do now. `seen_from_afar`: other hosts that share the file system must know at once."""
        with self._changing:
            self._at = step, phase
            self._write(seen_from_afar)
            if phase in PULSED and self._thread is None:
                self._thread = threading.Thread(target=self._pulse, name="pulse", daemon=True)
                self._thread.start()

    def enter(self, phase: Phase) -> None:
        """Another phase of the same step."""
        self.beat(self._at[0] if self._at else 0, phase)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """A phase within another, to which it returns: who waits for others afterwards waits in that one."""
        before = self._at[1] if self._at else "startup"
        self.enter(phase)
        yield
        self.enter(before)

    def close(self) -> None:
        """Give no further sign."""
        with self._changing:
            self._at = None

    def _pulse(self) -> None:
        while True:
            time.sleep(_PULSE_SECONDS)
            with self._changing:
                if self._at is None or self._at[1] not in PULSED:
                    self._thread = None
                    return
                self._write(seen_from_afar=True)

    def _write(self, seen_from_afar: bool = False) -> None:
        assert self._at is not None
        step, phase = self._at
        row = json.dumps({"rank": self.rank, "step": step, "phase": phase, "time": time.time(), "host": self._host})
        os.pwrite(self._file.fileno(), row.encode().ljust(256), 0)
        if seen_from_afar:  # network file systems write back when they like
            with suppress(OSError):
                os.fsync(self._file.fileno())


def record_collectives(folder: Path) -> None:
    """Let NCCL's flight recorder, where torch has one, leave its dump of a time-out in `folder`; groups made before this keep what they were made with."""
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "nccl_trace_rank_"))
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def beats(folder: Path) -> list[Beat]:
    """The last signs of all ranks."""
    found = []
    for path in folder.glob("rank-*.beat"):
        try:
            found.append(Beat(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):  # taken away, or half written, in this moment
            continue
    return sorted(found, key=lambda beat: beat.rank)


def _place(beat: Beat) -> tuple[int, int]:
    """How far a rank is: its step, and the phase of it."""
    return beat.step, _PHASES.index(beat.phase) if beat.phase in _PHASES else len(_PHASES)


def tells_of_a_lost_rank(told: str) -> bool:
    """Whether an error's words are those of a collective that another rank did not come to."""
    return any(sign in told for sign in (*_TIMEOUT, *SIGNS_OF_A_LOST_RANK))


def explain(folder: Path, error: BaseException, rank: int) -> str | None:
    """A letter about a collective that failed on this rank: who was behind and where. None if the error is of another kind."""
    told = str(error)
    if not tells_of_a_lost_rank(told):
        return None
    timed_out = any(sign in told for sign in _TIMEOUT)
    known = beats(folder)
    mine = next((beat for beat in known if beat.rank == rank), None)
    if mine is None:
        return None
    others = [beat for beat in known if beat.rank != rank]
    if not others:
        return None
    # Those that are the least far, were they even as far as this one: who hangs in the same phase may have begun it first or last.
    least = min(map(_place, others))
    late = sorted((beat for beat in others if _place(beat) == least), key=lambda beat: beat.time)
    where = f'step {mine.step}, "{mine.phase}"'
    who = ", ".join(
        f'rank {b.rank} on {b.host} (last seen at step {b.step}, "{b.phase}", {time.time() - b.time:.0f} s ago)' for b in late[:4]
    )
    more = " and others" if len(late) > 4 else ""
    if timed_out:
        return f"rank {rank} ({where}) waited in vain for {who}{more}. Their logs and `py-spy dump` on their hosts say what they do; run.timeout_seconds is how long a rank waits."
    return f"rank {rank} ({where}) lost its connection; behind was {who}{more} ({told[:160]})"
