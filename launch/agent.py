"""torchrun with open eyes: `python -m regrowth.launch.agent` takes torchrun's arguments, and watches the ranks that it starts for hangs.

A job's first node watches the signs of all ranks. When they hang, every node's agent lets its ranks write their stacks; then the first one ends its own, which
makes torchrun start all of them again.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from regrowth.errors import RegrowthError
from regrowth.files import write_text
from regrowth.launch.hanging import Hanging
from regrowth.launch.supervise import note_loss
from regrowth.pretrain.run_folder import RunFolder

_LOOK_SECONDS = 1.0
_STACKS_SECONDS = 4.0  # in which the other nodes see the request, and their ranks write


def main() -> None:
    """Watch in a thread; torchrun has this one, whose signals it handles."""
    note = os.environ.get("REGROWTH_JOB_NOTE")
    if note:
        threading.Thread(target=_watch, args=(Path(note),), name="watch for hangs", daemon=True).start()
    from torch.distributed.run import main as torchrun

    torchrun()


def _watch(note: Path) -> None:
    first_node, hanging, starts = os.environ.get("SLURM_NODEID", "0") == "0", None, set()
    answered = _asked_at(note)
    while True:
        time.sleep(_LOOK_SECONDS)
        workers = ranks_here()
        if (asked := _asked_at(note)) != answered:  # by the first node
            answered = asked
            for pid in workers:
                _send(pid, signal.SIGUSR2)
        if not first_node or not note.exists():
            continue
        if set(workers) != starts:  # torchrun has started them anew
            hanging, starts = None, set(workers)
        with suppress(RegrowthError, OSError, ValueError):  # a watcher that fails must not end what it watches
            run = RunFolder.open(Path(note.read_text(encoding="utf-8")))
            hanging = hanging or Hanging(run.path, run.config())
            if workers and (told := hanging()):
                print(f"{run.path}: {told}", file=sys.stderr, flush=True)
                write_text(_request(note), str(time.time()))
                time.sleep(_STACKS_SECONDS)
                for pid in workers:
                    _send(pid, signal.SIGUSR2)
                time.sleep(_LOOK_SECONDS)
                note_loss(run, f"{run.path}: {told} The stacks are in {run.path}/logs.")
                answered, hanging = _asked_at(note), None
                for pid in workers:
                    _send(pid, signal.SIGKILL)


def ranks_here() -> list[int]:
    """The ranks that this process's torchrun has started."""
    found = []
    with suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            for pid in (task / "children").read_text().split():
                with suppress(OSError):
                    if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                        found.append(int(pid))
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
