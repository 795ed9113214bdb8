"""Files that are either whole or absent: write → fsync → rename, for every file and folder that something later trusts."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from regrowth.errors import RunFailed, UserError


@contextmanager
def exclusive(path: Path, refusal: str | None = None) -> Iterator[IO[str]]:
    """Hold the lock file `path`, which is yielded open; the kernel lets go of it when the process ends, however it ends.

    Raises:
        UserError: `refusal`, if it is given and another process holds the lock; without it, wait.
    """
    with path.open("a") as lock:
        if refusal is None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif not any(_try_to_lock(lock) or time.sleep(0.05) for _ in range(20)):  # who only looks whether it is held holds it for a moment
            raise UserError(refusal)
        yield lock


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def user_cache() -> Path:
    """Where this project keeps what it can make or fetch again: in the user's own cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regrowth"


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each of them synced into the one that holds it: what is synced in a folder is lost with it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_entry(path)


def sync_entry(path: Path) -> None:
    """Flush the entry of a new folder to the disk."""
    with suppress(PermissionError):  # the one above may be open for writing and not for reading
        fsync_path(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed into place, on failure it is removed.

    Raises:
        RunFailed: the disk is full or the quota used up; nothing at `path` has changed.
    """
    make_folder(path.parent)
    # A number of its own beside the process id: two nodes, or two containers, can have the same one.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with disk_full_is_a_letter(path):
            yield partial
            fsync_path(partial)
            partial.replace(path)
            fsync_path(path.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextmanager
def disk_full_is_a_letter(path: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into a RunFailed that names the path and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFailed(disk_full_message(path)) from error


def disk_full_message(path: Path) -> str:
    """The letter about a full disk: which path, how much is free."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    return (f"{path}: the disk is full ({shutil.disk_usage(folder).free / 2**20:.1f} MiB free on it). What was written before is intact. "
            "Free some space or point the run at another disk, then start the same command again.")  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by people."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name that is not UTF-8
        text = json.dumps(value, indent=1) + "\n"
    write_text(path, text)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). The file is damaged; restore it or rebuild what wrote it.") from error


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line to a log. A crash or a full disk leaves at most one torn last line: the next append ends it, `read_jsonl` passes over it."""
    with disk_full_is_a_letter(path), path.open("ab+") as log:
        torn = log.seek(0, os.SEEK_END) > 0 and (log.seek(-1, os.SEEK_END), log.read(1))[1] != b"\n"
        log.write((b"\n" if torn else b"") + json.dumps(row, ensure_ascii=False).encode() + b"\n")


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, one by one; a torn last line (the writer was killed) is passed over, and a missing file is an empty log."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a log."""
    return list(iterate_jsonl(path))


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, in hex, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while piece := source.read(1 << 22):
            digest.update(piece)
            if on_bytes:
                on_bytes(len(piece))
    return digest.hexdigest()


def fingerprint(value: Any, length: int = 16) -> str:
    """A short content hash of any JSON-able value; equal values give equal names, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]
