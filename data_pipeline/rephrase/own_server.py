"""A server of this process's own: started when the first request is, looked after, and stopped with all that it has started."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from regrowth.data_pipeline.rephrase.config import ServerConfig
from regrowth.data_pipeline.rephrase.endpoint import Endpoint
from regrowth.errors import RunFailed, UserError

_LOOK_SECONDS = 0.5
_TOLD_LINES = 15
_PR_SET_PDEATHSIG = 1


class OwnServer:
    """The process that `server.start` describes.

    Args:
        beside: a file in whose folder its log is written.
    """

    def __init__(self, config: ServerConfig, beside: Path) -> None:
        assert config.start is not None
        self.config, self.start_config = config, config.start
        self.log = config.start.log or beside.with_name(f"{beside.stem}-server-{socket.gethostname()}-{os.getpid()}.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._port, self._starts = 0, 0

    def start(self) -> str:
        """Start it; returns its address.

        Raises:
            UserError: there is no such command.
        """
        self.stop()
        self._starts = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._spawn()
        return f"http://127.0.0.1:{self._port}/v1"

    def _spawn(self) -> None:
        self._starts += 1
        command = [word.replace("{model}", self.config.model).replace("{port}", str(self._port)) for word in self.start_config.command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log.open("ab") as log:
                # A session of its own, so that whatever it starts can be ended with it.
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                                 env={**os.environ, **self.start_config.env}, preexec_fn=_end_with_the_parent)  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"server.start.command: {command[0]} cannot be started ({error}).") from error

    async def wait(self, endpoint: Endpoint, ended: Callable[[], bool]) -> None:
        """Until it answers a tiny completion.

        Args:
            ended: whether nobody wants to wait any longer.

        Raises:
            UserError: it has ended, or says what no repetition mends.
            RunFailed: it has not answered for `wait_seconds`; it is stopped.
        """
        until, fault = time.monotonic() + self.start_config.wait_seconds, ""
        while not ended():
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                if self._starts > 1 and self.start_again():
                    continue
                raise UserError(
                    f"server.start.command: the server ended with {code} before it answered anything. Its last words ({self.log}):\n{self.last_words()}"
                )
            try:
                if (trouble := await endpoint.trial(busy_is_well=False)) is None:
                    return
                fault = str(trouble)
            except UserError as error:  # many answer 404 until they have loaded their model
                fault = str(error)
            if time.monotonic() > until:
                self.stop()
                raise RunFailed(f"server.start: the server has not answered anything for {self.start_config.wait_seconds:g} s ({fault}). Give it more with "
                                f"server.start.wait_seconds, or see its log, {self.log}:\n{self.last_words()}")  # fmt: skip
            await asyncio.sleep(_LOOK_SECONDS)

    def start_again(self) -> bool:
        """Start it once more if it has ended; whether it was.

        Raises:
            RunFailed: it has ended too often.
        """
        if self._process is None or (code := self._process.poll()) is None:
            return False
        if self._starts >= self.start_config.starts:
            raise RunFailed(f"server.start: the server ended {self._starts} times, the last time with {code}. Its last words ({self.log}):\n{self.last_words()}\n"
                            "What was answered is kept; mend it and run the same again.")  # fmt: skip
        self._end_group(signal.SIGKILL)  # what the server has started and left: it holds the port, or a GPU
        self._spawn()
        return True

    def last_words(self) -> str:
        """The end of its log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
                return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-_TOLD_LINES:])
        except OSError:
            return "(no log)"

    def stop(self, seconds: float | None = None) -> None:
        """End it and all that it has started: asked first, killed after `stop_seconds`."""
        if self._process is None:
            return
        self._starts = self.start_config.starts
        self._end_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self.start_config.stop_seconds if seconds is None else seconds)
        self._end_group(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _end_group(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid if self._process else 0, how)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # now: between fork and exec little may be done


def _end_with_the_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
