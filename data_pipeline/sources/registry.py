"""From a source's config to the source. Adding one: a config model in `source_config.py`, a class here beside it, a line below."""

from regrowth.data_pipeline import source_config as config
from regrowth.data_pipeline.sources.base import Source


def build_source(source: config.Source) -> Source:
    """The reader of a configured source; what it needs is imported here and not before."""
    if isinstance(source, config.InstalledSource):
        from regrowth.data_pipeline.sources.installed import InstalledText

        return InstalledText(source)
    if isinstance(source, config.TextSource | config.JsonlSource):
        from regrowth.data_pipeline.sources.files import JsonlFiles, TextFiles

        return TextFiles(source) if isinstance(source, config.TextSource) else JsonlFiles(source)
    if isinstance(source, config.ParquetSource | config.ArrowSource):
        from regrowth.data_pipeline.sources.tables import ArrowFiles, ParquetFiles

        return ParquetFiles(source) if isinstance(source, config.ParquetSource) else ArrowFiles(source)
    if isinstance(source, config.WarcSource | config.HtmlSource):
        from regrowth.data_pipeline.sources.web import HtmlFiles, WarcFiles

        return WarcFiles(source) if isinstance(source, config.WarcSource) else HtmlFiles(source)
    if isinstance(source, config.MegatronSource):
        from regrowth.data_pipeline.sources.megatron import MegatronFiles

        return MegatronFiles(source)
    from regrowth.data_pipeline.sources.hub import HubDataset

    return HubDataset(source)
