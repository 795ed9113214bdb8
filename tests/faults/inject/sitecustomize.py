"""On the path of the processes under test only: lets one rank do something terrible in one moment of its run, once.

Python imports this module by itself in each process. REGROWTH_TEST_FAULT names what is done, to whom, when, and the file that says that it was done;
REGROWTH_TEST_DISK puts the run on a strict disk.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from strict_disk import StrictDisk, cut_the_power

_FAULT = json.loads(os.environ.get("REGROWTH_TEST_FAULT", "{}"))


def _strike() -> None:
    marker = Path(_FAULT["marker"])
    if marker.exists():
        return
    marker.write_text(str(time.time()))
    victim = os.getppid() if _FAULT["who"] == "launcher" else os.getpid()
    match _FAULT["what"]:
        case "kill -9":
            os.kill(victim, signal.SIGKILL)
        case "SIGTERM":
            os.kill(victim, signal.SIGTERM)
            if victim != os.getpid():  # a launcher looks five times a second, and what is left of the run may take less
                time.sleep(2)
        case "SIGSTOP":
            os.kill(victim, signal.SIGSTOP)
            if victim != os.getpid():
                time.sleep(2)
                os.kill(victim, signal.SIGCONT)
        case "slow":
            time.sleep(2)
        case "stuck":
            threading.Event().wait()
        case "exception":
            raise RuntimeError("a fault put there by a test")
        case "exit code 1":
            os._exit(1)
        case "power cut":
            cut_the_power()


def _after(owner: Any, name: str) -> None:
    """Strike when a function has done its work and not yet returned."""
    original: Callable[..., Any] = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        _strike()
        return result

    setattr(owner, name, struck)


def _watch_for_the_moment() -> None:
    from regrowth.parallel.heartbeat import Heartbeat

    beat, here = Heartbeat.beat, int(os.environ["RANK"])
    aimed = here == (int(_FAULT["who"]) if _FAULT["who"].isdecimal() else 0)

    def watching(self: Heartbeat, step: int, phase: Any, **options: Any) -> None:
        beat(self, step, phase, **options)
        if not aimed or phase != _FAULT["phase"] or step < _FAULT["step"]:
            return
        if phase == "checkpoint":  # the tensors are on the disk, the manifest is not
            from regrowth.pretrain.tensor_files import StreamedWriter

            _after(StreamedWriter, "write_data")
        elif phase == "growth" and here == 0:  # likewise
            from regrowth.pretrain.growth import grow

            _after(grow, "_grow_files")
        else:
            _strike()

    Heartbeat.beat = watching  # type: ignore[method-assign]


def _watch_the_data_thread() -> None:
    """Rank 1's; it holds the next batch that is not needed before the moment comes, and is struck in it."""
    from regrowth.data_pipeline.feed import Feed
    from regrowth.parallel.heartbeat import Heartbeat

    beat, build, reached = Heartbeat.beat, Feed._build, threading.Event()
    first = _FAULT["step"] + (_FAULT["phase"] in ("forward and backward", "update"))  # the others come before their step

    def watching(self: Heartbeat, step: int, phase: Any, **options: Any) -> None:
        beat(self, step, phase, **options)
        if phase == _FAULT["phase"] and step >= _FAULT["step"]:
            reached.set()

    def struck(self: Feed[Any], step: int, ids: list[int]) -> Any:
        if step >= first:
            reached.wait()
            _strike()
        return build(self, step, ids)

    Heartbeat.beat = watching  # type: ignore[method-assign]
    Feed._build = struck  # type: ignore[method-assign]


if _FAULT and "RANK" in os.environ and not Path(_FAULT["marker"]).exists():
    if _FAULT["who"] != "data":
        _watch_for_the_moment()
    elif os.environ["RANK"] == "1":
        _watch_the_data_thread()
if disk := os.environ.get("REGROWTH_TEST_DISK"):
    StrictDisk(**json.loads(disk)).__enter__()  # as long as the process lives
