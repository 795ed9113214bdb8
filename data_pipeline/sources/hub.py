"""Datasets that the Hugging Face `datasets` library loads: a hub name, or a folder written by `save_to_disk`. Remote code is never run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.config import DatasetsSource
from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.sources.base import Item
from regrowth.errors import UserError


class HubDataset:
    """One item: the split. Local folders are memory-mapped, hub datasets streamed."""

    def __init__(self, config: DatasetsSource) -> None:
        self.config = config

    def items(self) -> list[Item]:
        """One item, stamped with the folder's time if local."""
        path = Path(self.config.path)
        stamp = str(path.stat().st_mtime_ns) if path.is_dir() else ""
        return [Item((self.config.path,), 0, f"{self.config.name}/{self.config.split}/{stamp}")]

    def read(self, item: Item) -> Iterator[Raw]:
        """The rows of the split.

        Raises:
            UserError: the dataset, the split or the text column is not there.
        """
        c = self.config
        fallback = c.domain or Path(c.path).name
        for number, row in enumerate(self._rows()):
            if c.max_documents is not None and number >= c.max_documents:
                return
            text = row.get(c.text_key)
            if number == 0 and c.text_key not in row:
                raise UserError(f"data.sources.path = {c.path}: no column {c.text_key!r}; set text_key to one of: {', '.join(row)}.")
            domain = row.get(c.domain_key) if not c.domain else None
            source = f"{c.path}/{c.split}#{number + 1}"
            yield Raw(text or "", domain if isinstance(domain, str) else fallback, source,
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
