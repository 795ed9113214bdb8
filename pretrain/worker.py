"""What a launcher starts: `python -m regrowth.pretrain.worker RUN CORPUS`, one per rank, with RANK, WORLD_SIZE and friends set.

An error is left as a letter in `logs/rank-N.error`, for the launcher to show; the traceback goes to the rank's log.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from regrowth.errors import RankLost, RegrowthError
from regrowth.parallel.heartbeat import Heartbeat
from regrowth.pretrain.rank_output import Stamped


def _die_with_the_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher is gone, so that a killed launcher leaves no ranks behind (Linux)."""
    launcher = os.environ.get("REGROWTH_LAUNCHER")
    if launcher and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(launcher):
            sys.exit(1)


def _may_not_come_again(error: BaseException) -> bool:
    """What devices, networks and disks raise, as against what is wrong in code."""
    return isinstance(error, (RuntimeError, OSError)) and not isinstance(error, NotImplementedError)


def letter_of(folder: Path) -> Path:
    """Where this rank leaves its letter; one of an earlier start is removed by whoever begins."""
    path = folder / "logs" / f"rank-{os.environ.get('RANK', '0')}.error"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def leave_letter(folder: Path, error: BaseException) -> int:
    """Write down why this rank ends, for whoever started it; returns the exit code."""
    code, message, mendable = 1, f"{type(error).__name__}: {error}", _may_not_come_again(error)  # mendable: by starting again
    if isinstance(error, RegrowthError):
        code, message, mendable = error.exit_code, str(error), isinstance(error, RankLost)
    elif isinstance(error, KeyboardInterrupt):
        code, message, mendable = 75, f"{folder}: interrupted; resume with: regrowth train --resume {folder}", False
    letter = {"exit_code": code, "message": message, "mendable": mendable, "time": time.time()}
    with suppress(OSError):  # on a full disk its log, or the job's, is left
        letter_of(folder).write_text(json.dumps(letter), encoding="utf-8")
    return code


def main() -> int:
    """Returns the exit code."""
    folder, corpus = Path(sys.argv[1]), sys.argv[2]  # a corpus may be an address
    letter_of(folder).unlink(missing_ok=True)
    _die_with_the_launcher()
    try:
        heart = Heartbeat(folder / "logs", int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        heart.beat(0, "startup")
        from regrowth.pretrain.train import train

        train(folder, corpus, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), heart)
        return 0
    except BaseException as error:
        code = leave_letter(folder, error)
        traceback.print_exc()
        return code


if __name__ == "__main__":
    faulthandler.enable()  # a crash in native code leaves its Python stack in the rank's log
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # and a launcher that finds it hanging asks for the same
    sys.stdout = sys.stderr = Stamped(sys.stderr)  # both are the rank's log
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and the process group is closed. Leave without the interpreter's teardown, in which communication threads that
    # are still winding down abort the process now and then, and a finished run would look failed.
    os._exit(code)
