"""Sources: each lists its work items, and reads one item at a time, so that any rank can take any item.

An item is the unit of work, of resumption and of output: its documents become one curated shard. Items are listed in a stable order; the
listing (paths and sizes) is part of a corpus's fingerprint, so a changed input makes a new corpus instead of a stale one.
"""

import bz2
import glob
import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from regrowth.data_pipeline.document import Raw
from regrowth.errors import UserError


@dataclass(frozen=True)
class Item:
    """One unit of reading: the files (or the one name) it covers, and their size in bytes as far as known."""

    paths: tuple[str, ...]
    size: int
    stamp: str = ""  # changes when the contents do

    def describe(self) -> dict[str, Any]:
        """What the fingerprint sees."""
        return {"paths": list(self.paths), "size": self.size, "stamp": self.stamp}


class Source(Protocol):
    """What the runner needs of a source."""

    def items(self) -> list[Item]: ...

    def read(self, item: Item) -> Iterator[Raw]: ...


def find_files(path: Path, suffixes: tuple[str, ...], key: str) -> list[Path]:
    """The files at `path`: itself, below it if a folder, matching it if a glob; sorted.

    Raises:
        UserError: there is nothing at `path`, or nothing with these suffixes.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(suffixes))
        if not found:
            raise UserError(f"{key} = {path}: no file in this folder ends in {', '.join(suffixes)}.")
        return found
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())  # noqa: PTH207
    if not found:
        raise UserError(f"{key} = {path}: there is no such file or folder (and as a pattern it matches none).")
    return found


def item_of(*paths: Path) -> Item:
    """An item over these files, stamped with their sizes and times."""
    stats = [p.stat() for p in paths]
    return Item(tuple(str(p) for p in paths), sum(s.st_size for s in stats), ",".join(str(s.st_mtime_ns) for s in stats))


def grouped(paths: list[Path], bytes_per_item: int = 8 << 20) -> list[Item]:
    """Small files packed into items of about `bytes_per_item`."""
    items, held, size = [], [], 0
    for path in paths:
        held.append(path)
        size += path.stat().st_size
        if size >= bytes_per_item:
            items.append(item_of(*held))
            held, size = [], 0
    if held:
        items.append(item_of(*held))
    return items


def open_packed(path: Path) -> BinaryIO:
    """Open a file for reading bytes, unpacking .gz, .zst, .xz and .bz2 as a stream."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if path.suffix in (".zst", ".zstd"):
        import io

        import zstandard

        return cast(BinaryIO, io.BufferedReader(zstandard.open(path, "rb")))  # pyright: ignore[reportArgumentType]
    return path.open("rb")


def read_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers, from 1. A line over `max_bytes` comes as None and is passed over in bounded memory."""
    with open_packed(path) as source:
        number = 0
        while line := source.readline(max_bytes + 1):
            number += 1
            if len(line) > max_bytes:
                while line and not line.endswith(b"\n"):
                    line = source.readline(max_bytes)
                yield number, None
            else:
                yield number, line


def decode(data: bytes) -> str:
    """UTF-8 with U+FFFD where it is not; the quality filter drops a document with too many of those as `not_utf8`."""
    return data.decode("utf-8", errors="replace")
