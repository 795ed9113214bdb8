"""Start a run's ranks on this machine, watch them, and say what happened.

The launcher imports no torch. Workers run in sessions of their own: Ctrl-C reaches the launcher alone, which asks them to write a
checkpoint and stop. If one rank dies, the others, which would wait for it for ever, are ended.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from regrowth.errors import RankLost, RegrowthError, RunFailed, Stopped, UserError
from regrowth.launch.stacks import note_all
from regrowth.parallel.heartbeat import SIGNS_OF_A_LOST_RANK

_SIGNS_OF_AN_ECHO = (*SIGNS_OF_A_LOST_RANK, "gloo", "NCCL", "DistStoreError", "DistNetworkError")
_GRACE_SECONDS = 120.0  # to finish a step and write a checkpoint after a request to stop


class RankRaised(RankLost):
    """A rank was lost by an error of its own, which a new start may mend."""


class Letter(NamedTuple):
    """What a rank left behind about its end."""

    rank: int
    exit_code: int
    message: str
    mendable: bool  # by a new start
    time: float

    @property
    def echo(self) -> bool:
        """Whether it only tells of a neighbour's death."""
        return any(sign in self.message for sign in _SIGNS_OF_AN_ECHO)


class WorkerFailed(RunFailed):
    """A rank ended with an error of its own; carries that error's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_local(
    folder: Path, corpus: str, ranks: int, asked: "StopSignals", watch: Callable[[bool], None], hung: Callable[[], str | None]
) -> None:
    """Run all ranks of the run in `folder` to their end.

    Args:
        asked: what asks to stop: once for a checkpoint first, twice for at once.
        watch: called about five times a second, with True at the end: shows progress.
        hung: called as often; a sentence if the ranks are found hanging, who are then asked for their stacks and ended.

    Raises:
        Stopped: on request, once the checkpoint is written.
        RankLost: a rank was killed, hung, or ended for a reason that need not come again.
        WorkerFailed, UserError: the first rank's own letter.
    """
    meeting = tempfile.TemporaryDirectory(prefix="regrowth-")  # ranks of one machine meet at a file: no port is open to others
    workers = _start(folder, corpus, ranks, Path(meeting.name) / "store")
    stopping_since: float | None = None
    try:
        while True:
            codes = [worker.poll() for worker in workers]
            watch(False)
            if all(code == 0 for code in codes):
                watch(True)
                return
            if any(code not in (None, 0) for code in codes):
                first = {rank for rank, code in enumerate(codes) if code is not None}
                break
            if stopping_since is None and (told := hung()):
                held = _ask_for_stacks(folder, workers)
                _end(workers, grace=0.0)
                raise RankLost(f"{folder}: {told} {held}The stacks are in {folder}/logs. {_resume(folder)}")
            if asked.count and stopping_since is None:
                stopping_since = time.monotonic()
                _signal(workers, signal.SIGTERM)
            if asked.count > 1 or (stopping_since is not None and time.monotonic() - stopping_since > _GRACE_SECONDS):
                _end(workers, grace=0.0)
                raise Stopped(f"{folder}: ended at once; the newest checkpoint stands. Go on with: regrowth train --resume {folder}")
            time.sleep(0.2)
        time.sleep(0.5)  # the other ranks may be writing their own letters
        _end(workers, grace=20.0 if stopping_since is not None or _stopped(folder) else 3.0)
        watch(True)
        codes = [worker.poll() for worker in workers]
        if stopping_since is not None and any(code == -signal.SIGTERM for code in codes):  # asked before they were ready to be
            raise Stopped(f"{folder}: stopped before the first step. Go on with: regrowth train --resume {folder}")
        letter = _letter(folder, codes, first)
        raise RunFailed(str(letter)) if stopping_since is not None and isinstance(letter, RankLost) else letter  # asked to stop: not again
    finally:
        _end(workers, grace=0.0)
        meeting.cleanup()


def _start(folder: Path, corpus: str, ranks: int, store: Path) -> list[subprocess.Popen[bytes]]:
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    workers = []
    for path in logs.glob("rank-*.error"):  # of an earlier start, of ranks that this one may not have
        path.unlink()
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "REGROWTH_STORE": str(store),
            "REGROWTH_LAUNCHER": str(os.getpid()),
        }
        if Path("/sys/class/net/lo").exists():
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
            environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        with (logs / f"rank-{rank}.log").open("ab") as log:
            command = [sys.executable, "-u", "-m", "regrowth.pretrain.worker", str(folder), corpus]
            workers.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            )
    return workers


def _ask_for_stacks(folder: Path, workers: list[subprocess.Popen[bytes]]) -> str:
    """Let each rank write its Python stacks into its log, and add what others see of it.

    Returns:
        A sentence on the ranks that a debugger, a signal or a device holds.
    """
    _signal(workers, signal.SIGUSR2)
    time.sleep(1.0)
    states = note_all({worker.pid: folder / "logs" / f"rank-{rank}.log" for rank, worker in enumerate(workers)})
    held = [f"rank {rank} is in state {state}" for rank, state in enumerate(states) if state[:1] in ("T", "t", "D")]
    return f"{', '.join(held)}. " if held else ""


def _signal(workers: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _end(workers: list[subprocess.Popen[bytes]], grace: float) -> None:
    """Wait `grace` seconds for the workers to end by themselves, then kill those that are left."""
    until = time.monotonic() + grace
    while time.monotonic() < until and any(worker.poll() is None for worker in workers):
        time.sleep(0.1)
    _signal(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()


def _resume(folder: Path) -> str:
    return f"The newest checkpoint stands; go on with: regrowth train --resume {folder}"


def letters(folder: Path) -> list[Letter]:
    """What the ranks of the last start left, by rank."""
    found = []
    for path in (folder / "logs").glob("rank-*.error"):
        with suppress(ValueError, KeyError, OSError):
            told = json.loads(path.read_text(encoding="utf-8"))
            rank = int(path.stem.removeprefix("rank-"))
            found.append(Letter(rank, int(told["exit_code"]), str(told["message"]), bool(told["mendable"]), float(told["time"])))
    return sorted(found)


def final_letter(folder: Path) -> RegrowthError | None:
    """What a rank of the last start has said that no new start mends: a letter to the user, or of what is wrong in the run itself."""
    for letter in letters(folder):
        if not letter.mendable and letter.exit_code != Stopped.exit_code and not letter.echo:
            return UserError(letter.message) if letter.exit_code == UserError.exit_code else RunFailed(letter.message)
    return None


def _stopped(folder: Path) -> bool:
    return any(letter.exit_code == Stopped.exit_code for letter in letters(folder))


def _letter(folder: Path, codes: list[int | None], first: set[int]) -> RegrowthError:
    """What to tell of workers that did not all end well: a killed rank first, then the user's faults, then the rest.

    Args:
        first: the ranks that had ended when the launcher saw it and ended the others.
    """
    left = letters(folder)
    resume = _resume(folder)
    written = {letter.rank for letter in left}
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and rank not in written and code != -signal.SIGKILL:
            return RankLost(f"{folder}: rank {rank} was ended by {signal.Signals(-code).name}. {resume}")
    for kind in (UserError.exit_code, Stopped.exit_code):
        if chosen := [letter.message for letter in left if letter.exit_code == kind and not letter.echo]:
            return Stopped(chosen[0]) if kind == Stopped.exit_code else UserError(chosen[0])
    if own := [letter for letter in left if not letter.echo]:
        letter = min(own, key=lambda letter: (letter.mendable, letter.time))  # what no new start mends, before the rest
        told = f"{letter.message} (rank {letter.rank}, log: {folder}/logs/rank-{letter.rank}.log) {resume}"
        return RankRaised(told) if letter.mendable and letter.exit_code == RankLost.exit_code else WorkerFailed(told, letter.exit_code)
    # Letters of ranks that lost a neighbour only echo its death: the neighbour was killed from outside.
    silent = [rank for rank in range(len(codes)) if rank not in written]
    if silent and not first.intersection(silent):
        echo = left[0].message if left else "no letter was left"
        return RankLost(f"{folder}: rank {silent[0]} hung, others lost it, and it was ended ({echo}; logs in {folder}/logs). {resume}")
    who = f"rank {silent[0]}" if silent else "a rank"
    if silent and (code := codes[silent[0]] or 0) > 0:
        return RankLost(
            f"{folder}: {who} ended with exit code {code} and left no letter; its log is {folder}/logs/rank-{silent[0]}.log. {resume}"
        )
    return RankLost(f"{folder}: {who} was killed (SIGKILL: out of memory, or by hand; its log is in {folder}/logs). {resume}")


class StopSignals:
    """While it is open, SIGINT and SIGTERM are counted instead of died of."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: nobody presses Ctrl-C there
                self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: object) -> None:
        self.count += 1
