"""Answers that were paid for. An answer is handed on only when it is written here, so that whatever kills the process, nobody pays for it again."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from regrowth.data_pipeline.sqlite_file import SqliteFile

_LAYOUT = 1
_TABLE = """
create table if not exists answers (
    key text primary key, text text not null, finish text not null, error text not null, transient integer not null, attempts integer not null,
    prompt_tokens integer not null, completion_tokens integer not null, at real not null
) without rowid
"""

_TOTALS = (
    "create table if not exists totals (one integer primary key check (one = 1), prompt integer not null, completion integer not null)"
)


@dataclass(frozen=True)
class Answer:
    """What came of a request: a text, or the error of its last attempt."""

    text: str = ""
    finish: str = ""  # "stop", "length", ...
    error: str = ""
    transient: bool = False  # whether the error might not come again
    attempts: int = 1
    prompt_tokens: int = 0  # of all attempts that were answered, as far as the server says
    completion_tokens: int = 0


def request_key(payload: dict[str, Any], *marks: str) -> str:
    """The name of a request: of all that is sent, and whatever else it stands for (the document, the prompt's version)."""
    return xxhash.xxh3_128_hexdigest(json.dumps([payload, *marks], sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def tokens_in(path: Path) -> tuple[int, int] | None:
    """What `RequestCache.spent` would say, by a look from outside that holds up nobody; None where there is nothing to see."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1.0)) as connection:
            return connection.execute("select prompt, completion from totals").fetchone()
    except sqlite3.Error:
        return None


class RequestCache(SqliteFile):
    """The answers in a file; to be used by any thread.

    Raises:
        UserError: the file is none of these, or cannot be written.
        RunFailed: the disk is full; so do all methods.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a cache of requests", "cache", (_TABLE, _TOTALS, "insert or ignore into totals values (1, 0, 0)"), _LAYOUT)

    def find(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers that are there, by key."""
        found, wanted = {}, list(keys)
        fields = "text, finish, error, transient, attempts, prompt_tokens, completion_tokens"
        with self.told():
            for begin in range(0, len(wanted), 500):
                some = wanted[begin : begin + 500]
                marks = ",".join("?" * len(some))
                for key, *values in self.connection.execute(f"select key, {fields} from answers where key in ({marks})", some):
                    values[3] = bool(values[3])
                    found[key] = Answer(*values)
        return found

    def store(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Keep answers, in one transaction; a later one takes the place of an earlier."""
        now = time.time()
        rows = [{**asdict(answer), "key": key, "at": now} for key, answer in answers]
        with self.transaction() as connection:
            connection.executemany(
                "insert or replace into answers values (:key, :text, :finish, :error, :transient, :attempts, :prompt_tokens, :completion_tokens, :at)",
                rows,
            )
            tokens = [sum(row[key] for row in rows) for key in ("prompt_tokens", "completion_tokens")]
            connection.execute("update totals set prompt = prompt + ?, completion = completion + ?", tokens)

    def spent(self) -> tuple[int, int]:
        """Tokens of all answers that were ever stored, those that others replaced among them: of prompts, and of completions."""
        with self.told():
            return self.connection.execute("select prompt, completion from totals").fetchone()
