"""Arrow in one place: `pyarrow.compute` under a name that type checkers can stand, and the reading of stream files."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from regrowth.errors import UserError

# Its functions are made at import time, where type checkers cannot see them.
pc: Any = importlib.import_module("pyarrow.compute")


def read_stream(path: Path, remedy: str = "") -> Iterator[tuple[int, pa.RecordBatch]]:
    """The record batches of an IPC stream file, memory-mapped, each with the number of its first row.

    Raises:
        UserError: the file is missing or damaged; `remedy` says what to do about it.
    """
    start = 0
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            for batch in reader:
                yield start, batch
                start += len(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: missing or damaged ({error}). {remedy}".strip()) from error
