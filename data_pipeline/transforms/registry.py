"""From a transform's config to the transform. Adding one: a config model in `config.py`, a class here beside it, a line below."""

from regrowth.data_pipeline import config
from regrowth.data_pipeline.transforms.base import Transform
from regrowth.data_pipeline.transforms.normalise import NormaliseText
from regrowth.data_pipeline.transforms.quality import QualityFilter


def build_transforms(configs: list[config.Transform]) -> list[Transform]:
    """The batch-wise transforms, in order. Deduplication needs the whole corpus and is done by the runner's reduce."""
    built: list[Transform] = []
    for transform in configs:
        if isinstance(transform, config.Normalise):
            built.append(NormaliseText())
        elif isinstance(transform, config.Quality):
            built.append(QualityFilter(transform))
    return built
