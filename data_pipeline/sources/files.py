"""Text trees, JSON lines and parquet."""

import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from regrowth.data_pipeline.config import JsonlSource, ParquetSource, TextSource
from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.sources.base import Item, decode, find_files, grouped, item_of, read_lines
from regrowth.errors import UserError

PACKED = ("", ".gz", ".zst", ".xz", ".bz2")


class TextFiles:
    """One document a file; the domain is the configured one, else the first folder below the source's path."""

    def __init__(self, config: TextSource) -> None:
        self.config = config

    def items(self) -> list[Item]:
        """Files in path order, small ones grouped."""
        return grouped(find_files(self.config.path, tuple(self.config.suffixes), "data.sources.path"))

    def read(self, item: Item) -> Iterator[Raw]:
        """Every file of the item; an unreadable one is dropped with its reason."""
        for name in item.paths:
            path = Path(name)
            try:
                text = decode(path.read_bytes())
            except OSError as error:
                yield Raw("", self._domain(path), name, {"error": str(error)}, dropped="unreadable_file")
                continue
            yield Raw(text, self._domain(path), name)

    def _domain(self, path: Path) -> str:
        if self.config.domain:
            return self.config.domain
        below = path.relative_to(self.config.path).parts if self.config.path.is_dir() else ()
        return below[0] if len(below) > 1 else self.config.path.stem


class JsonlFiles:
    """One document a line. Broken lines are dropped by name and number; a file that ends in the middle keeps what came before."""

    def __init__(self, config: JsonlSource) -> None:
        self.config = config

    def items(self) -> list[Item]:
        """One item a file."""
        suffixes = tuple(f".{kind}{packed}" for kind in ("jsonl", "json", "ndjson") for packed in PACKED)
        return [item_of(path) for path in find_files(self.config.path, suffixes, "data.sources.path")]

    def read(self, item: Item) -> Iterator[Raw]:
        """The rows of the item's file."""
        path = Path(item.paths[0])
        fallback = self.config.domain or path.name.split(".")[0]
        budget = self.config.max_megabytes * 1e6 if self.config.max_megabytes else float("inf")
        number = 0
        try:
            for number, line in read_lines(path, int(self.config.max_line_megabytes * 1e6)):
                document = self._parse(line, f"{path}#{number}", fallback)
                if document is None:
                    continue
                yield document
                budget -= len(document.text)
                if budget < 0:
                    return
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            yield Raw("", fallback, f"{path}#{number + 1}", {"error": str(error)}, dropped="damaged_file")
        except Exception as error:
            if type(error).__name__ != "ZstdError":
                raise
            yield Raw("", fallback, f"{path}#{number + 1}", {"error": str(error)}, dropped="damaged_file")

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


class ParquetFiles:
    """One document a row; read row group by row group."""

    def __init__(self, config: ParquetSource) -> None:
        self.config = config

    def items(self) -> list[Item]:
        """One item a file."""
        return [item_of(path) for path in find_files(self.config.path, (".parquet",), "data.sources.path")]

    def read(self, item: Item) -> Iterator[Raw]:
        """The rows of the item's file.

        Raises:
            UserError: the file is not parquet, or lacks the text column.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(item.paths[0])
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not readable as parquet ({error}). Remove it from the source or fetch it again.") from error
        columns = file.schema_arrow.names
        if self.config.text_key not in columns:
            raise UserError(f"{path}: no column {self.config.text_key!r}; set text_key to one of: {', '.join(columns)}.")
        wanted = [self.config.text_key] + [self.config.domain_key] * (self.config.domain_key in columns)
        fallback, number = self.config.domain or path.stem, 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            texts = batch.column(0).to_pylist()
            domains = batch.column(1).to_pylist() if len(wanted) > 1 and not self.config.domain else [None] * len(texts)
            for text, domain in zip(texts, domains, strict=True):
                number += 1
                source = f"{path}#{number}"
                yield Raw(
                    text or "", str(domain or fallback), source, dropped="" if isinstance(text, str) else f"no_{self.config.text_key}"
                )
