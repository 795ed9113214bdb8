"""What a rank prints, with the time before each line, so that the logs of many ranks can be read as one."""

import io
import threading
import time
from contextlib import suppress
from typing import Any, TextIO


class Stamped(io.TextIOBase):
    """A stream whose lines begin with the time, to the millisecond.

    Args:
        log: where the lines go.
        also: another stream that gets the same without times.
    """

    def __init__(self, log: TextIO, also: TextIO | None = None) -> None:
        self.log, self.also = log, also
        self._fresh, self._writing = True, threading.RLock()

    def write(self, text: str) -> int:
        """Print."""
        with self._writing:
            if self.also:
                with suppress(OSError, ValueError):
                    self.also.write(text)
                    self.also.flush()
            with suppress(OSError, ValueError):  # a full disk must not end what only wanted to tell something
                for line in text.splitlines(keepends=True):
                    self.log.write(_stamp() + line if self._fresh else line)
                    self._fresh = line.endswith("\n")
                self.log.flush()  # a killed rank's last words count
        return len(text)

    def flush(self) -> None:
        """Everything is written already."""

    def fileno(self) -> int:
        """Where native code writes."""
        return self.log.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["log"], name)


def _stamp() -> str:
    now = time.time()
    local = time.localtime(now)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{int(now % 1 * 1000):03d}{time.strftime('%z', local)} "
