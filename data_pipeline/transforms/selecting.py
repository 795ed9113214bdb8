"""Transforms that give scores to be selected by: those of a fitted selector, and predictive strength. `keep_best` behind them keeps the best."""

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.select.loss_store import LossStore
from regrowth.data_pipeline.select.selector import load_selector
from regrowth.data_pipeline.select.strength import load_models, predictive_strength
from regrowth.data_pipeline.transform_config import SelectorScore, Strength
from regrowth.data_pipeline.transforms.base import Parted, Verdict, _Base, append_score, part, with_columns
from regrowth.data_pipeline.transforms.hashing import content_hashes


class _Scorer(_Base):
    level = 0  # a score drops nothing


class SelectorScorer(_Scorer):
    """Adds a score to each document; those that the selector can say nothing of get none. With a threshold, drops with: low_NAME. `counts` tells what it spent."""

    name = "selector"

    def __init__(self, config: SelectorScore) -> None:
        self.score_name, self._least = config.name or config.path.name, config.min_score
        self._selector = load_selector(config.path, "data.transforms.path")
        self._selector.warm()

    def __call__(self, batch: pa.RecordBatch) -> Parted:
        before = self._selector.flops
        scores = np.asarray(self._selector.score(batch), np.float32)
        self.counts[f"{self.score_name}: megaflops"] += round((self._selector.flops - before) / 1e6)
        if unsaid := int(np.isnan(scores).sum()):
            self.counts[f"{self.score_name}: documents without a score"] += unsaid
        named = with_columns(batch, scores=append_score(batch.column("scores"), self.score_name, scores))
        if self._least is None:
            return named, None
        verdict = Verdict.keep_all(len(batch))
        verdict.drop(~(scores >= np.float32(self._least)), f"low_{self.score_name}")
        return part(named, verdict, self.name, 3)

    def close(self) -> None:
        """Free its model."""
        self._selector.close()


class StrengthScorer(_Scorer):
    """Adds to each document its `strength`, and each model's bits per character as `bpc_NAME`."""

    name = "strength"

    def __init__(self, config: Strength) -> None:
        self.config = config
        self._models, scores = load_models(config.models_file, config.target)
        self._weights = scores if config.weights == "gaps" else None
        self._store = LossStore([(f"{config.models_file}: {model.name}", model.path) for model in self._models], config.losses)

    def __call__(self, batch: pa.RecordBatch) -> Parted:
        hashes = [value.tobytes() for value in content_hashes(batch.column("text"))]
        before = self._store.flops
        bits = self._store.losses(batch.column("text").to_pylist(), hashes).bits_per_character
        self.counts["megaflops"] += round((self._store.flops - before) / 1e6)
        strength = predictive_strength(bits, self._weights)
        if unsaid := int(np.isnan(strength).sum()):
            self.counts["documents without losses"] += unsaid
        scores = append_score(batch.column("scores"), self.name, strength)
        for model, row in zip(self._models, bits, strict=True):
            scores = append_score(scores, f"bpc_{model.name}", row)
        return with_columns(batch, scores=scores), None

    def close(self) -> None:
        """Free the models."""
        self._store.close()
