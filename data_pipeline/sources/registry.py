"""From a source's config to the source."""

from regrowth.data_pipeline import config
from regrowth.data_pipeline.sources.base import Source
from regrowth.data_pipeline.sources.files import JsonlFiles, ParquetFiles, TextFiles
from regrowth.data_pipeline.sources.hub import HubDataset
from regrowth.data_pipeline.sources.installed import InstalledText


def build_source(source: config.Source) -> Source:
    """The reader of a configured source."""
    if isinstance(source, config.InstalledSource):
        return InstalledText(source)
    if isinstance(source, config.TextSource):
        return TextFiles(source)
    if isinstance(source, config.JsonlSource):
        return JsonlFiles(source)
    if isinstance(source, config.ParquetSource):
        return ParquetFiles(source)
    return HubDataset(source)
