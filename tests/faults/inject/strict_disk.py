"""A disk that keeps what POSIX says it has to, and no more: for each file what it held at its last fsync, for each folder its entries at its own last fsync.

Loaded into the processes under test, it notes in a journal outside of the run's folder what they make durable; `tests.faults.lost_writes` then takes away the rest. Nothing but
`os.fsync` and `os.fdatasync` counts, which is all that the run's writers use.
"""

import ctypes
import json
import os
import shutil
import signal
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_HERE, _NO_FOLLOW, _EMPTY_PATH, _BIRTH = -100, 0x100, 0x1000, 0x800  # of statx(2)


def key_of(target: int | Path) -> str:
    """What tells a file or folder from all others, also from an earlier one of the same inode: inode and time of birth.

    Raises:
        OSError: there is none, or its file system notes no births.
    """
    found = ctypes.create_string_buffer(256)
    at = (target, b"", _EMPTY_PATH) if isinstance(target, int) else (_HERE, os.fsencode(target), _NO_FOLLOW)
    if _LIBC.statx(*at, 0xFFF, found):
        raise OSError(ctypes.get_errno(), f"statx: {target}")
    if not struct.unpack_from("<I", found, 0)[0] & _BIRTH:
        raise OSError(f"{target}: its file system notes no births")
    return "{}-{}-{}".format(*struct.unpack_from("<Q", found, 32), *struct.unpack_from("<qI", found, 80))


def record(target: int | Path, journal: Path) -> Callable[[], Any]:
    """Copy a file's bytes, or a folder's entries; the result, when called, makes the copy what the disk has."""
    key, source = key_of(target), Path(f"/proc/self/fd/{target}") if isinstance(target, int) else target
    staged = journal / f".{key}-{os.getpid()}-{threading.get_ident()}"
    if source.is_dir():
        entries = {}
        for entry in source.iterdir():
            with suppress(FileNotFoundError):  # another process has just taken it away
                entries[entry.name] = [key_of(entry), entry.is_dir()]
        staged.write_text(json.dumps(entries))
    else:
        shutil.copyfile(source, staged)
    return lambda: staged.replace(journal / key)


def cut_the_power() -> None:
    """Kill the whole run at once: all ranks and their launcher, of whom this process is one."""
    launcher = int(os.environ.get("REGROWTH_LAUNCHER", os.getpid()))
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in {*map(int, children), launcher} - {os.getpid()}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class StrictDisk:
    """While it is open, this process's syncs below `root` are noted in `journal`.

    Args:
        cut: when the power goes: {"count": N} at the Nth moment before or after any sync or rename of any process, or {"call": "sync" or "rename", "path": its end, "after": bool}.
    """

    def __init__(self, root: str, journal: str, cut: dict[str, Any] | None = None) -> None:
        self.root, self.journal, self.cut = root, Path(journal), cut or {}
        self.originals = {name: getattr(os, name) for name in ("fsync", "fdatasync", "replace", "rename")}

    def __enter__(self) -> "StrictDisk":
        for name, original in self.originals.items():
            setattr(os, name, self._syncing(original) if name.endswith("sync") else self._renaming(original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def _syncing(self, original: Callable[[int], None]) -> Callable[[Any], None]:
        def synced(file: Any) -> None:
            fd = file if isinstance(file, int) else file.fileno()
            path = str(Path(f"/proc/self/fd/{fd}").readlink())
            if not self._ours(path):
                return original(fd)
            self._moment("sync", path, after=False)
            commit = record(fd, self.journal)  # what comes while it is being synced may not be part of it
            original(fd)
            commit()
            self._moment("sync", path, after=True)

        return synced

    def _renaming(self, original: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            path = os.fspath(target)
            if not self._ours(path):
                return original(source, target, **options)
            self._moment("rename", path, after=False)
            original(source, target, **options)
            self._moment("rename", path, after=True)

        return renamed

    def _ours(self, path: str) -> bool:
        return path == self.root or path.startswith(f"{self.root}/")

    def _moment(self, call: str, path: str, after: bool) -> None:
        if not self.cut or path.endswith(".beat"):  # signs of life come as often as they come
            return
        if "count" in self.cut:
            with (self.journal / "moments").open("ab") as moments:
                moments.write(b".")
                moments.flush()
                due = moments.tell() >= self.cut["count"]
        else:
            due = (call, after) == (self.cut["call"], self.cut["after"]) and path.endswith(self.cut["path"])
        if due:
            cut_the_power()
