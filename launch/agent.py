"""torchrun with open eyes: `python -m regrowth.launch.agent` takes torchrun's arguments, and watches the ranks that it starts for hangs.

A job's first node watches the signs of all ranks. When they hang, every node's agent lets its ranks write their stacks; then the first one ends its own, which
makes torchrun start all of them again.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from regrowth.launch.hanging import Hanging
from regrowth.launch.stacks import note_all
from regrowth.launch.supervise import note_loss
from regrowth.parallel.mesh import is_address, listen_on
from regrowth.pretrain.run_folder import RunFolder

_LOOK_SECONDS = 1.0
_STACKS_SECONDS = 4.0  # in which the other nodes see the request, and their ranks write


def main() -> None:
    """Watch in a thread; torchrun has this one, whose signals it handles."""
    note = os.environ.get("REGROWTH_JOB_NOTE")
    if note:
        threading.Thread(target=_watch, args=(Path(note),), name="watch for hangs", daemon=True).start()
    from torch.distributed.run import main as torchrun

    _meet_on_one_network()
    torchrun()


def _meet_on_one_network() -> None:
    """Let torchrun's meeting point, where it is named by an address, listen there and not on all networks of its host."""
    endpoint = next((word.partition("=")[2] for word in sys.argv if word.startswith("--rdzv-endpoint=")), "")
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    if not is_address(host) or not port.isdecimal():
        return
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend as backend

    store = getattr(backend, "TCPStore", None)  # a name inside of torch: without it, torch's way
    if store is None:
        return

    def bound(host_name: str, number: int, *more: Any, is_master: bool = False, **options: Any) -> Any:
        if is_master and (host_name, number) == (host, int(port)):
            try:
                options["master_listen_fd"] = listen_on(host, number)
            except OSError as error:  # another agent of this host has it: torchrun then joins that one
                raise RuntimeError(str(error)) from error
        return store(host_name, number, *more, is_master=is_master, **options)

    backend.TCPStore = bound
    with suppress(OSError), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as own:
        own.bind((host, 0))  # an address of this host: its ranks, should the first be among them, meet there too
        sys.argv.insert(1, f"--local-addr={host}")


def _watch(note: Path) -> None:
    first_node = os.environ.get("SLURM_NODEID", "0") == "0"
    if first_node:
        with suppress(OSError):  # there from the start, and rewritten in its place: network file systems remember what was not there
            _request(note).touch()
    answered, hanging, watched = _asked_at(note), None, list[int]()
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            workers = ranks_here()
            if (asked := _asked_at(note)) != answered:  # by the first node
                answered = asked
                ask_for_stacks(workers, _logs(note))
            if first_node and note.exists():
                if workers != watched:  # torchrun has started them anew
                    hanging, watched = None, workers
                run = RunFolder.open(Path(note.read_text(encoding="utf-8")))
                hanging = hanging or Hanging(run.path, run.config())
                if workers and (told := hanging()):
                    hanging = None
                    _end(run, workers, told, _request(note))
                    answered = _asked_at(note)
        except Exception as error:  # a watcher that fails must not end what it watches
            print(f"regrowth's watch for hangs: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(30)


def _end(run: RunFolder, workers: list[int], told: str, request: Path) -> None:
    try:
        print(f"{run.path}: {told}", file=sys.stderr, flush=True)
        request.write_text(str(time.time()), encoding="utf-8")
        time.sleep(_STACKS_SECONDS)  # this node's ranks answer in the next look, or now
        ask_for_stacks(workers, run.path / "logs")
        time.sleep(_LOOK_SECONDS)
        note_loss(run, f"{run.path}: {told} The stacks are in {run.path}/logs.")
    finally:
        for pid in workers:
            _send(pid, signal.SIGKILL)


def ask_for_stacks(workers: list[int], logs: Path | None) -> None:
    """SIGUSR2 to those that listen to it; others, which have only just begun, would die of it. Then what others see of all of them."""
    for pid in workers:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
            if caught >> (signal.SIGUSR2 - 1) & 1:
                _send(pid, signal.SIGUSR2)
    if logs:
        time.sleep(0.5)  # their own come first
        ranks = {pid: rank for pid in workers if (rank := _rank_of(pid)) is not None}
        note_all({pid: logs / f"rank-{rank}.log" for pid, rank in ranks.items()})


def _logs(note: Path) -> Path | None:
    return Path(note.read_text(encoding="utf-8")) / "logs" if note.exists() else None


def _rank_of(pid: int) -> int | None:
    """The rank that a process has in its environment."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return int(entry.removeprefix(b"RANK="))
    return None


def ranks_here() -> list[int]:
    """The ranks that this process's torchrun has started."""
    found = []
    with suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            for pid in (task / "children").read_text().split():
                found += [int(pid)] if _rank_of(int(pid)) is not None else []
    return sorted(found)


def _request(note: Path) -> Path:
    return note.with_suffix(".stacks")


def _asked_at(note: Path) -> str:
    try:
        return _request(note).read_text(encoding="utf-8")
    except OSError:
        return ""


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    main()
