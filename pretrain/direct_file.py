"""Large files that are written once and read later by others, past the page cache.

Through the cache, gigabytes of a checkpoint push out what is needed, and the kernel spends more time on finding pages than the disk on writing them. Linux only;
elsewhere, and on file systems that do not take it (tmpfs), the same writes go the usual way.
"""

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_BUFFER = 8 << 20
_BLOCK = 4096  # what addresses, sizes and offsets must be multiples of
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file; what is given is copied, and written by a thread while the next is made. On the disk when it is closed without an error.

    Raises (when written to or closed):
        OSError: the disk is full, or fails.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)
        self._buffers = [memoryview(mmap.mmap(-1, _BUFFER)) for _ in range(2)]  # begin at a page
        self._filled = self._size = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._size += len(data)
        while data:
            piece = data[: _BUFFER - self._filled]
            self._buffers[0][self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == _BUFFER:
                self._hand_over(_BUFFER)

    def _hand_over(self, size: int) -> None:
        self._wait()
        self._writing = self._thread.submit(self._write, self._buffers[0][:size])
        self._buffers.reverse()
        self._filled = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._file, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _DIRECT:
                    raise
                import fcntl

                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                if not flags & _DIRECT:
                    raise
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)  # it could be opened so, and not written

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._hand_over(-(-self._filled // _BLOCK) * _BLOCK)  # what is behind the end is cut off
                self._wait()
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
        finally:
            self._thread.shutdown()
            os.close(self._file)
