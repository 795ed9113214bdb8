"""From a selector's config to the selector. Adding one: a config model in `config.py`, a class beside those, a line below."""

from pathlib import Path
from typing import Any

from regrowth.data_pipeline.select import config as known
from regrowth.data_pipeline.select.record import model_mark, read_record
from regrowth.data_pipeline.select.selector import Selector
from regrowth.errors import UserError
from regrowth.files import sha256_of


def build_selector(config: Any, folder: Path) -> Selector:
    """The selector; what it needs is imported here and not before."""
    if isinstance(config, known.Random | known.LengthMatched | known.Importance):
        from regrowth.data_pipeline.select import simple

        plain = {known.Random: simple.RandomChoice, known.LengthMatched: simple.RandomOfLength, known.Importance: simple.ImportanceWeights}
        return plain[type(config)](config, folder)
    if isinstance(config, known.Classifier | known.Regression):
        from regrowth.data_pipeline.select import learned

        return (learned.ByClassifier if isinstance(config, known.Classifier) else learned.ByRegression)(config, folder)
    if isinstance(config, known.PreSelect):
        from regrowth.data_pipeline.select.preselect import ByPredictiveStrength

        return ByPredictiveStrength(config, folder)
    from regrowth.data_pipeline.select import by_model

    return (by_model.ByPerplexity if isinstance(config, known.Perplexity) else by_model.LossDifference)(config, folder)


def inputs_of(config: Any) -> dict[str, str]:
    """Hashes of the files and models that a selector is made of.

    Raises:
        UserError: a file is not there.
    """
    found = {}
    for key in type(config).inputs:
        if (path := getattr(config, key)) is not None:
            if not Path(path).is_file():
                raise UserError(f"selectors.{key} = {path}: there is no such file.")
            found[key] = sha256_of(Path(path))
    if type(config).models:
        found |= {key: model_mark(getattr(config, key)) for key in type(config).models}
    if isinstance(config, known.PreSelect):
        found |= _models_of(config)
    if isinstance(config, known.LengthMatched):
        found["like"] = read_record(config.like, "selectors.like")["mark"]
    return found


def _models_of(config: known.PreSelect) -> dict[str, str]:
    from regrowth.data_pipeline.select.strength import load_models

    models, scores = load_models(config.models_file, config.target)
    return {f"model {model.name}": f"{model_mark(model.path)} {score!r}" for model, score in zip(models, scores, strict=True)}
