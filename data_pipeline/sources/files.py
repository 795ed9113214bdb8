"""Text trees and JSON lines."""

import json
from collections.abc import Iterator
from pathlib import PurePosixPath

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import JsonlSource, TextSource
from regrowth.data_pipeline.sources.base import Item, decode, grouped, item_of, pieces, read_lines
from regrowth.data_pipeline.sources.paths import PACKED, find_files, open_packed, open_raw

JSONL = tuple(f".{kind}{packed}" for kind in ("jsonl", "json", "ndjson") for packed in PACKED)
_MAX_FILE_BYTES = 64 << 20  # of a text file: it is one document, and held whole


class TextFiles:
    """One document a file; the domain is the configured one, else the first folder below the source's path."""

    def __init__(self, config: TextSource) -> None:
        self.config = config

    def items(self, target_bytes: int) -> list[Item]:
        """Files in path order, small ones grouped."""
        return grouped(find_files(self.config.path, tuple(self.config.suffixes), "data.sources.path"), target_bytes)

    def read(self, item: Item) -> Iterator[Raw]:
        """Every file of the item; an unreadable one is dropped with its reason."""
        for path in item.paths:
            try:
                with open_raw(path) as file:
                    data = file.read(_MAX_FILE_BYTES + 1)
            except OSError as error:
                yield Raw("", self._domain(path), path, {"error": str(error)}, dropped="unreadable_file")
                continue
            if len(data) > _MAX_FILE_BYTES:
                yield Raw("", self._domain(path), path, dropped="file_too_large")
            else:
                yield Raw(_from_any_encoding(data), self._domain(path), path)

    def _domain(self, path: str) -> str:
        if self.config.domain:
            return self.config.domain
        root, inner = PurePosixPath(self.config.path), PurePosixPath(path)
        below = inner.relative_to(root).parts if inner.is_relative_to(root) else ()
        return below[0] if len(below) > 1 else root.stem


def _from_any_encoding(data: bytes) -> str:
    """UTF-8, or UTF-16 and UTF-32 by their byte-order marks."""
    for mark, encoding in (
        (b"\xff\xfe\x00\x00", "utf-32"),
        (b"\x00\x00\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    return decode(data)


class JsonlFiles:
    """One document a line. Broken lines are dropped by name and offset; a file that ends in the middle keeps what came before."""

    def __init__(self, config: JsonlSource) -> None:
        self.config = config

    def items(self, target_bytes: int) -> list[Item]:
        """One item a file, several for a large file that is not packed."""
        found = find_files(self.config.path, JSONL, "data.sources.path")
        whole = self.config.max_megabytes is not None
        return [
            item for file in found for item in ([item_of(file)] if whole or file.path.endswith(PACKED[1:]) else pieces(file, target_bytes))
        ]

    def read(self, item: Item) -> Iterator[Raw]:
        """The rows of the item's file, or of its piece."""
        path = item.paths[0]
        fallback = self.config.domain or PurePosixPath(path).name.split(".")[0]
        budget = self.config.max_megabytes * 1e6 if self.config.max_megabytes else float("inf")
        offset = 0
        try:
            with open_packed(path, self.config.max_unpack_ratio) as stream:
                for offset, line in read_lines(stream, int(self.config.max_line_megabytes * 1e6), item.piece):
                    document = self._parse(line, f"{path}@{offset}", fallback)
                    if document is None:
                        continue
                    yield document
                    budget -= len(document.text)
                    if budget < 0:
                        return
        except OSError as error:
            yield Raw("", fallback, f"{path}@after-{offset}", {"error": str(error)}, dropped="damaged_file")

    def _parse(self, line: bytes | None, source: str, domain: str) -> Raw | None:
        if line is None:
            return Raw("", domain, source, dropped="line_too_long")
        if not line.strip():
            return None
        try:
            row = json.loads(decode(line))
        except (ValueError, RecursionError):
            return Raw(decode(line), domain, source, dropped="not_json")
        text = row.get(self.config.text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            return Raw(decode(line), domain, source, dropped=f"no_{self.config.text_key}")
        if not self.config.domain and isinstance(row.get(self.config.domain_key), str):
            domain = row[self.config.domain_key]
        known = (self.config.text_key, self.config.domain_key)
        return Raw(text, domain, source, {k: v for k, v in row.items() if k not in known and isinstance(v, str | int | float)})
