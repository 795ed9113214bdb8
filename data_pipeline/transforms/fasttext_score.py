"""Documents scored by fastText models: anybody's, and those that our selectors train."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.transform_config import FastTextScore
from regrowth.data_pipeline.transforms.base import Filter, Verdict, append_score, part, with_columns
from regrowth.data_pipeline.transforms.hashing import text_bytes
from regrowth.errors import UserError, need

_TEXTS_AT_ONCE = 500  # few enough to stay in a processor's cache
LABEL, NO_LABEL = "__label__", "__label_ _"


def load_fasttext(path: str, key: str) -> Any:
    """A fastText model.

    Raises:
        UserError: the package or the file is missing, or it is not a model.
    """
    fasttext = need("fasttext", "scoring with a fastText model")
    if not Path(path).is_file():
        raise UserError(f"{key} = {path}: there is no such file.")
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise UserError(f"{key} = {path}: not a fastText model ({error}).") from error


def lines_of(texts: pa.LargeStringArray, hide_labels: bool = False) -> list[bytes]:
    """Each text as a line: UTF-8, without "\\n" but for its end. Of all texts together, without strings in between, which took a twentieth of fastText's own time.

    Args:
        hide_labels: what would be taken for a label becomes words.
    """
    bounds, whole = text_bytes(texts)
    lines = whole.tobytes().replace(b"\n", b" ")
    found = [lines[begin:end] + b"\n" for begin, end in pairwise(bounds)]
    return [line.replace(LABEL.encode(), NO_LABEL.encode()) for line in found] if hide_labels and LABEL.encode() in lines else found


def probabilities(model: Any, texts: pa.LargeStringArray, label: str, hide_labels: bool = False) -> np.ndarray:
    """float64 [n]: the probability of a label in each text."""
    found: list[float] = []
    for begin in range(0, len(texts), _TEXTS_AT_ONCE):
        some: Any = texts.slice(begin, _TEXTS_AT_ONCE)
        # What `predict` calls for a list, which takes strings only, and copies and checks each of them.
        labels, scores = model.f.multilinePredict(lines_of(some, hide_labels), -1, 0.0, "strict")
        found += [values[names.index(label)] if label in names else 0.0 for names, values in zip(labels, scores, strict=True)]
    return np.array(found, np.float64)


class FastTextScorer(Filter):
    """Adds a score to each document (the probability of one label); with a threshold, drops with: low_NAME."""

    name = "fasttext"
    level = 3

    def __init__(self, config: FastTextScore) -> None:
        self.config = config
        self._model = load_fasttext(config.model, "data.transforms.model")
        if config.label not in (labels := self._model.get_labels()):
            raise UserError(f'data.transforms.label = "{config.label}": {config.model} has the labels {", ".join(labels[:20])}.')

    def score(self, texts: pa.LargeStringArray) -> np.ndarray:
        """float32 [n]: the probability of the label."""
        limit = self.config.scored_characters
        begins = pc.utf8_slice_codeunits(texts, 0, limit) if limit else texts
        return probabilities(self._model, begins, self.config.label).astype(np.float32)

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        scores = self.score(batch.column("text"))  # pyright: ignore[reportArgumentType]
        named = with_columns(batch, scores=append_score(batch.column("scores"), self.config.name, scores))
        verdict = Verdict.keep_all(len(batch))
        if self.config.min_score is not None:
            verdict.drop(scores < self.config.min_score, f"low_{self.config.name}")
        return part(named, verdict, self.name, self.level if self.config.min_score is not None else 0)
