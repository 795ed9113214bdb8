"""A small database in one file, which processes share and a crash leaves whole.

Rollback journals without syncing: what a process has committed outlives the process, and needs nothing of the file system but locks, where write-ahead logs would need memory
shared among all hosts. A power cut may cost the last rows.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from regrowth.errors import RunFailed, UserError
from regrowth.files import disk_full_message

_BUSY_SECONDS = 120.0  # how long another process may hold the lock


class SqliteFile:
    """A connection for each thread, and letters instead of tracebacks.

    Args:
        what: the file is, for people.
        key: of the config, that names it.
        tables: statements that make the tables where they are not there.
        layout: a number that changes with the tables.

    Raises:
        UserError: the file is none of these, or cannot be written.
        RunFailed: the disk is full; so does everything done inside `told`.
    """

    def __init__(self, path: Path, what: str, key: str, tables: tuple[str, ...], layout: int) -> None:
        self.path, self.what, self.key = path, what, key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{key} = {path}: its folder cannot be made ({error.strerror}). Name another with {key}.") from error
        self._of_thread, self._open = threading.local(), []
        with self.told():
            for statement in tables:
                self.connection.execute(statement)
            found = self.connection.execute("pragma user_version").fetchone()[0]
            if found not in (0, layout):
                raise UserError(f"{path}: {what} of layout {found}, this version has {layout}. Name another with {key}.")
            self.connection.execute(f"pragma user_version = {layout}")

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's own."""
        if not hasattr(self._of_thread, "connection"):
            # Another thread does no more with it than close it.
            self._of_thread.connection = made = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            made.execute("pragma journal_mode = truncate")
            made.execute("pragma synchronous = off")
            self._open.append(made)
        return self._of_thread.connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside, or none of it."""
        with self.told():
            self.connection.execute("begin immediate")
            try:
                yield self.connection
            except BaseException:
                self.connection.execute("rollback")
                raise
            self.connection.execute("commit")

    def close(self) -> None:
        """Let go of the file; no thread uses it any more."""
        for connection in self._open:
            connection.close()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the database become letters."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise RunFailed(disk_full_message(self.path)) from error
            raise UserError(
                f"{self.path}: {error}. {self.what[:1].upper() + self.what[1:]} needs a folder that can be written, on a file system with locks."
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: not {self.what} ({error}). Move it away, or name another with {self.key}.") from error
