"""Datasets that the Hugging Face `datasets` library loads: a hub name, or a folder written by `save_to_disk`. Remote code is never run."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import DatasetsSource
from regrowth.data_pipeline.sources.base import Item
from regrowth.errors import UserError


class HubDataset:
    """A split. Local folders are memory-mapped, hub datasets streamed."""

    def __init__(self, config: DatasetsSource) -> None:
        self.config = config

    def items(self, target_bytes: int) -> list[Item]:
        """Runs of rows of a local dataset, the shards of a streamed one; stamped with the folder's time if local."""
        c, path = self.config, Path(self.config.path)
        stamp = f"{c.name}/{c.split}/{path.stat().st_mtime_ns if path.is_dir() else ''}"
        rows = self._rows()
        if c.max_documents is not None:
            return [Item((c.path,), 0, stamp)]
        if hasattr(rows, "n_shards") and not hasattr(rows, "num_rows"):
            return [Item((c.path,), 0, stamp, (k, k + 1)) for k in range(rows.n_shards)]
        size = int(rows.dataset_size or rows.data.nbytes)
        count = max(1, min(len(rows), round(size / target_bytes)))
        borders = [len(rows) * k // count for k in range(count + 1)]
        return [Item((c.path,), size // count, stamp, (a, b)) for a, b in itertools.pairwise(borders)]

    def read(self, item: Item) -> Iterator[Raw]:
        """The rows of the item.

        Raises:
            UserError: the dataset, the split or the text column is not there.
        """
        c, rows, first = self.config, self._rows(), 0
        place = "/".join(filter(None, (c.path, c.name, c.split)))
        if item.piece and hasattr(rows, "num_rows"):
            first = item.piece[0]
            rows = rows.select(range(*item.piece))
        elif item.piece:
            if rows.n_shards > 1:
                rows = rows.shard(num_shards=rows.n_shards, index=item.piece[0])
            place = f"{place}/{item.piece[0]}"
        fallback = c.domain or Path(c.path).name
        for number, row in enumerate(rows, start=first):
            if c.max_documents is not None and number >= c.max_documents:
                return
            text = row.get(c.text_key)
            if number == first and c.text_key not in row:
                raise UserError(f"data.sources.path = {c.path}: no column {c.text_key!r}; set text_key to one of: {', '.join(row)}.")
            domain = row.get(c.domain_key) if not c.domain else None
            known = (c.text_key, c.domain_key)
            meta = {k: v for k, v in row.items() if k not in known and isinstance(v, str | int | float)}
            if isinstance(text, str) and len(text) > c.max_document_megabytes * 1e6:
                yield Raw("", fallback, f"{place}@{number}", dropped="document_too_large")
                continue
            yield Raw(text or "", domain if isinstance(domain, str) else fallback, f"{place}@{number}", meta,
                      dropped="" if isinstance(text, str) else f"no_{c.text_key}")  # fmt: skip

    def _rows(self) -> Any:
        import datasets
        from datasets.exceptions import DatasetNotFoundError

        c = self.config
        try:
            if (Path(c.path) / "state.json").exists() or (Path(c.path) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(c.path)
                return loaded[c.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(c.path, c.name, split=c.split, streaming=not Path(c.path).exists())
        except (FileNotFoundError, KeyError, ValueError, ConnectionError, DatasetNotFoundError) as error:
            raise UserError(
                f"data.sources.path = {c.path} (name {c.name}, split {c.split}): datasets could not load it: {error}"
            ) from error
