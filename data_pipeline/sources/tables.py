"""Parquet and Arrow IPC: one document a row, the other scalar columns kept as `meta`."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import ArrowSource, ParquetSource, TableSource
from regrowth.data_pipeline.sources.base import Item, item_of
from regrowth.data_pipeline.sources.paths import Found, find_files, open_raw
from regrowth.errors import UserError


class _Tables:
    """What both kinds share: the first file must have the text column; a later one without it is dropped by name."""

    suffixes: tuple[str, ...]

    def __init__(self, config: TableSource) -> None:
        self.config = config

    def _columns(self, path: str) -> list[str]:
        raise NotImplementedError

    def _split(self, file: Found, target_bytes: int) -> list[Item]:
        raise NotImplementedError

    def _batches(self, path: str, piece: tuple[int, int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        raise NotImplementedError

    def items(self, target_bytes: int) -> list[Item]:
        """One item a file; a file of several row groups or batches is split.

        Raises:
            UserError: the first file is not of this format, or has no text column.
        """
        found = find_files(self.config.path, self.suffixes, "data.sources.path")
        try:
            columns = self._columns(found[0].path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{found[0].path}: not readable as {self.config.kind} ({error}). Remove it from the source or fetch it again."
            ) from error
        if self.config.text_key not in columns:
            raise UserError(f"{found[0].path}: no column {self.config.text_key!r}; set text_key to one of: {', '.join(columns)}.")
        return [item for file in found for item in self._split(file, target_bytes)]

    def read(self, item: Item) -> Iterator[Raw]:
        """The rows of the item's file or piece; a damaged file keeps what came before, one of another schema is dropped by name."""
        path = item.paths[0]
        fallback = self.config.domain or PurePosixPath(path).name.split(".")[0]
        number = 0
        try:
            if self.config.text_key not in (columns := self._columns(path)):
                yield Raw("", fallback, path, {"columns": ", ".join(columns)}, dropped="wrong_schema")
                return
            for number, batch in self._batches(path, item.piece):
                batch.validate(full=True)  # offsets and text of a foreign file: reading unchecked ones can end the process
                for begin, some in _in_pieces(batch):
                    yield from self._rows(path, some, number + begin, fallback)
                number += len(batch)
        except KeyError as error:
            yield Raw("", fallback, path, {"error": f"not exactly one column {error}"}, dropped="wrong_schema")
        except (pa.ArrowException, OSError, ValueError) as error:
            yield Raw("", fallback, f"{path}@after-{number}", {"error": str(error)}, dropped="damaged_file")

    def _rows(self, path: str, batch: pa.RecordBatch, first: int, fallback: str) -> Iterator[Raw]:
        c = self.config
        if not pa.types.is_string(kind := batch.column(c.text_key).type) and not pa.types.is_large_string(kind):
            yield Raw("", fallback, path, {"type": str(kind)}, dropped="wrong_schema")
            return
        rest = [name for name in batch.schema.names if name != c.text_key and _is_scalar(batch.schema.field(name).type)]
        texts, others = batch.column(c.text_key).to_pylist(), [batch.column(name).to_pylist() for name in rest]
        limit = c.max_document_megabytes * 1e6
        for row, text in enumerate(texts):
            if text is not None and len(text) > limit:
                yield Raw("", fallback, f"{path}@{first + row}", dropped="document_too_large")
                continue
            meta: dict[str, Any] = {name: values[row] for name, values in zip(rest, others, strict=True) if values[row] is not None}
            domain = meta.pop(c.domain_key, None) if not c.domain else None
            yield Raw(
                text or "", str(domain or fallback), f"{path}@{first + row}", meta, dropped="" if text is not None else f"no_{c.text_key}"
            )


def _in_pieces(batch: pa.RecordBatch, target_bytes: int = 16 << 20) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A batch in runs of rows of about `target_bytes`, so that few Python objects live at once."""
    rows = max(1, int(len(batch) * target_bytes / max(batch.nbytes, 1)))
    for begin in range(0, len(batch), rows):
        yield begin, batch.slice(begin, rows)


def _is_scalar(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


class ParquetFiles(_Tables):
    """Parquet, read row group by row group."""

    suffixes = (".parquet",)

    def __init__(self, config: ParquetSource) -> None:
        super().__init__(config)

    def _columns(self, path: str) -> list[str]:
        import pyarrow.parquet as pq

        with open_raw(path) as stream:
            return pq.ParquetFile(stream).schema_arrow.names

    def _split(self, file: Found, target_bytes: int) -> list[Item]:
        import pyarrow.parquet as pq

        if file.size <= 1.5 * target_bytes:
            return [item_of(file)]
        try:
            with open_raw(file.path) as stream:
                metadata = pq.ParquetFile(stream).metadata
                sizes = [metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)]
        except (pa.ArrowException, OSError):
            return [item_of(file)]  # the reader will say what is wrong with it
        return _cut(file, sizes, target_bytes)

    def _batches(self, path: str, piece: tuple[int, int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        import pyarrow.parquet as pq

        with open_raw(path) as stream:
            file = pq.ParquetFile(stream)
            first, stop = piece or (0, file.metadata.num_row_groups)
            number = sum(file.metadata.row_group(g).num_rows for g in range(first))
            wanted = [
                name for name in file.schema_arrow.names if _is_scalar(file.schema_arrow.field(name).type) or name == self.config.text_key
            ]
            groups = [file.metadata.row_group(g) for g in range(first, stop)]
            average = sum(g.total_byte_size for g in groups) / max(sum(g.num_rows for g in groups), 1)
            size = max(1, min(1024, int((16 << 20) / max(average, 1))))
            for batch in file.iter_batches(batch_size=size, row_groups=list(range(first, stop)), columns=wanted):
                yield number, batch
                number += len(batch)


def _cut(file: Found, sizes: list[int], target_bytes: int) -> list[Item]:
    """Neighbouring groups of a file packed to items of about `target_bytes`."""
    scale = file.size / max(sum(sizes), 1)
    items, first, held = [], 0, 0
    for group, size in enumerate(sizes):
        held += size
        if held * scale >= target_bytes or group == len(sizes) - 1:
            items.append(item_of(file, piece=(first, group + 1), size=int(held * scale)))
            first, held = group + 1, 0
    return items


class ArrowFiles(_Tables):
    """Arrow IPC, file or stream format; files in the file format are split by their batches."""

    suffixes = (".arrow", ".ipc", ".feather", ".arrows")

    def __init__(self, config: ArrowSource) -> None:
        super().__init__(config)

    def _columns(self, path: str) -> list[str]:
        with open_raw(path) as stream:
            return _reader(stream).schema.names

    def _split(self, file: Found, target_bytes: int) -> list[Item]:
        if file.size <= 1.5 * target_bytes:
            return [item_of(file)]
        try:
            with open_raw(file.path) as stream:
                reader = _reader(stream)
                count = reader.num_record_batches if isinstance(reader, pa.ipc.RecordBatchFileReader) else 0
        except (pa.ArrowException, OSError):
            return [item_of(file)]
        return _cut(file, [1] * count, target_bytes) if count else [item_of(file)]

    def _batches(self, path: str, piece: tuple[int, int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        with open_raw(path) as stream:
            reader = _reader(stream)
            number = 0
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                first, stop = piece or (0, reader.num_record_batches)
                number = sum(len(reader.get_batch(b)) for b in range(first))
                for position in range(first, stop):
                    batch = reader.get_batch(position)
                    yield number, batch
                    number += len(batch)
                return
            for batch in reader:
                yield number, batch
                number += len(batch)


def _reader(stream: Any) -> Any:
    begin = stream.read(6)
    stream.seek(0)
    return pa.ipc.open_file(stream) if begin == b"ARROW1" else pa.ipc.open_stream(stream)
