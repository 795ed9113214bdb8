"""Sources: each lists its work items, and reads one item at a time, so that any rank can take any item.

An item is the unit of work, of resumption and of output: its documents become one curated part. Items are listed in a stable order; the
listing (paths, sizes, stamps, pieces) is part of a corpus's fingerprint, so a changed input makes a new corpus instead of a stale one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Protocol

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.sources.paths import Found


@dataclass(frozen=True)
class Item:
    """One unit of reading: the files (or the one name) it covers, and their size in bytes as far as known.

    `piece` is the part of a large file that this item reads, [start, stop): bytes of a text, row groups or batches of a table. None: all of it.
    """

    paths: tuple[str, ...]
    size: int
    stamp: str = ""  # changes when the contents do
    piece: tuple[int, int] | None = None

    def describe(self) -> dict[str, Any]:
        """What the fingerprint and the plan see."""
        return {**asdict(self), "paths": list(self.paths), "piece": list(self.piece) if self.piece else None}

    @classmethod
    def restore(cls, described: dict[str, Any]) -> "Item":
        """The item that `describe` described."""
        piece = described["piece"]
        return cls(tuple(described["paths"]), described["size"], described["stamp"], tuple(piece) if piece else None)


class Source(Protocol):
    """What the runner needs of a source."""

    def items(self, target_bytes: int) -> list[Item]:
        """The work items in a stable order, each of about `target_bytes` where files can be split or grouped."""
        ...

    def read(self, item: Item) -> Iterator[Raw]:
        """The documents of an item. What cannot be used comes with a reason in `dropped`."""
        ...


def item_of(*files: Found, piece: tuple[int, int] | None = None, size: int | None = None) -> Item:
    """An item over these files."""
    return Item(tuple(f.path for f in files), sum(f.size for f in files) if size is None else size, ",".join(f.stamp for f in files), piece)


def grouped(files: list[Found], target_bytes: int) -> list[Item]:
    """Small files packed into items of about `target_bytes`."""
    items, held, size = [], [], 0
    for file in files:
        held.append(file)
        size += file.size
        if size >= target_bytes:
            items.append(item_of(*held))
            held, size = [], 0
    if held:
        items.append(item_of(*held))
    return items


def pieces(file: Found, target_bytes: int) -> list[Item]:
    """One large file that can be read from any byte, as several items of about `target_bytes`."""
    count = max(1, round(file.size / target_bytes))
    if count == 1:
        return [item_of(file)]
    borders = [file.size * k // count for k in range(count + 1)]
    return [item_of(file, piece=(a, b), size=b - a) for a, b in itertools.pairwise(borders)]


def read_lines(stream: BinaryIO, max_bytes: int, piece: tuple[int, int] | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Lines with the offsets of their first bytes. A line over `max_bytes` comes as None and is passed over in bounded memory.

    A piece holds the lines that begin in [start, stop): every line of a file is in exactly one of its pieces.
    """
    offset, stop = 0, float("inf")
    if piece is not None:
        offset, stop = piece
        if offset:
            stream.seek(offset - 1)
            offset -= 1
            while line := stream.readline(max_bytes):  # the rest of a line that began before
                offset += len(line)
                if line.endswith(b"\n"):
                    break
    while offset < stop and (line := stream.readline(max_bytes + 1)):
        begin, length = offset, len(line)
        if length > max_bytes:
            while line and not line.endswith(b"\n"):
                line = stream.readline(max_bytes)
                length += len(line)
            yield begin, None
        else:
            yield begin, line
        offset = begin + length


def decode(data: bytes) -> str:
    """UTF-8 with U+FFFD where it is not; the quality filter drops a document with too many of those as `not_utf8`."""
    return data.decode("utf-8", errors="replace")
