"""From a transform's config to the transform. Adding one: a config model in `transform_config.py`, a class here beside it, a line below."""

from typing import Any

from regrowth.data_pipeline import transform_config as config
from regrowth.data_pipeline.transforms.base import Transform


def build_transforms(configs: list[Any]) -> list[Transform]:
    """The batch-wise transforms, in order; what each needs is imported here and not before. Deduplication needs the whole corpus: see phases."""
    return [_build(transform) for transform in configs]


def _build(transform: Any) -> Any:
    if isinstance(transform, config.Normalise):
        from regrowth.data_pipeline.transforms.normalise import NormaliseText

        return NormaliseText()
    if isinstance(transform, config.Quality):
        from regrowth.data_pipeline.transforms.quality import QualityFilter

        return QualityFilter(transform)
    if isinstance(transform, config.GopherQuality | config.GopherRepetition | config.C4 | config.FineWeb):
        from regrowth.data_pipeline.transforms import prose

        classes = {
            config.GopherQuality: prose.GopherQualityFilter,
            config.GopherRepetition: prose.GopherRepetitionFilter,
            config.C4: prose.C4Rules,
            config.FineWeb: prose.FineWebFilter,
        }
        return classes[type(transform)](transform)
    if isinstance(transform, config.FixUnicode | config.Boilerplate | config.MaskPii):
        from regrowth.data_pipeline.transforms import cleaning

        if isinstance(transform, config.FixUnicode):
            return cleaning.UnicodeRepair(transform)
        return cleaning.BoilerplateLines(transform) if isinstance(transform, config.Boilerplate) else cleaning.MaskPersonalData(transform)
    if isinstance(transform, config.Rephrase):
        from regrowth.data_pipeline.rephrase.transform import Rephraser

        return Rephraser(transform)
    if isinstance(transform, config.SelectorScore | config.Strength):
        from regrowth.data_pipeline.transforms import selecting

        return selecting.SelectorScorer(transform) if isinstance(transform, config.SelectorScore) else selecting.StrengthScorer(transform)
    if isinstance(transform, config.FastTextScore):
        from regrowth.data_pipeline.transforms.fasttext_score import FastTextScorer

        return FastTextScorer(transform)
    from regrowth.data_pipeline.transforms import choosing

    others = {
        config.Language: choosing.LanguageFilter,
        config.UrlFilter: choosing.UrlRules,
        config.BlockedWords: choosing.BlockedWordsFilter,
        config.Decontaminate: choosing.Decontaminator,
    }
    return others[type(transform)](transform)
