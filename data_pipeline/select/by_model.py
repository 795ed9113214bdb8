"""Selectors whose scores are losses of language models: perplexity, BERTIN's sampling, MiniPLM's difference."""

from typing import Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.select.config import Difference, Perplexity
from regrowth.data_pipeline.select.loss_store import DocumentLosses, LossStore, Tell, same_tokenizer
from regrowth.data_pipeline.select.pool import Pool
from regrowth.data_pipeline.select.selector import Selector, chances
from regrowth.data_pipeline.transforms.hashing import content_hashes
from regrowth.errors import UserError
from regrowth.files import read_json, write_json

_QUARTILES = "quartiles.json"


class _ByLosses(Selector):
    """Base of those that hold models."""

    _store: LossStore | None = None

    @property
    def store(self) -> LossStore:
        """The models; they are loaded when a loss is asked for that nobody has taken."""
        if self._store is None:
            keys = type(self.config).models
            self._store = LossStore([(f"selectors.{key}", getattr(self.config, key)) for key in keys], self.config.losses)
            self._store.counts = self.counts
        return self._store

    def losses(self, batch: pa.RecordBatch, tell: Tell = lambda *_: None) -> DocumentLosses:
        """Of all models on a batch."""
        return self.store.losses(batch.column("text").to_pylist(), [h.tobytes() for h in content_hashes(batch.column("text"))], tell)

    @property
    def flops(self) -> float:
        """The models' forward passes."""
        return self._store.flops if self._store else 0.0

    def close(self) -> None:
        """Free the models."""
        if self._store:
            self._store.close()
            self._store = None


class ByPerplexity(_ByLosses):
    """exp of the loss per token, low or high, or drawn with odds that its place among the pool's quartiles gives.

    gaussian: odds fall with the distance from the median; stepwise: odds in inverse proportion to the width of the quartile that a document is in.
    The published factors do not give the published rates, so none is used: `keep_best` sets the rate.
    """

    config: Perplexity

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """The quartiles of perplexity in the pool, where they are needed."""
        if self.config.prefer in ("low", "high"):
            return {}
        sample = pool.sample(self.config.sample, self.config.seed)
        perplexity = np.exp(self.store.losses(sample.texts, sample.hashes, tell).per_token[0])
        if not (known := np.isfinite(perplexity)).sum() >= 8:
            raise UserError(
                f"selectors.model = {self.config.model}: {known.sum()} of {len(sample)} sampled documents have a perplexity; quartiles need at least 8."
            )
        quartiles = np.quantile(perplexity[known], [0.25, 0.5, 0.75]).tolist()
        write_json(self.folder / _QUARTILES, quartiles)
        return {"quartiles": quartiles}

    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """Minus or plus the log of perplexity; or odds over chance."""
        per_token = self.losses(batch).per_token[0]
        if self.config.prefer in ("low", "high"):
            return per_token if self.config.prefer == "high" else -per_token
        odds = gaussian_odds if self.config.prefer == "gaussian" else stepwise_odds
        quartiles = read_json(self.folder / _QUARTILES)
        return odds(np.exp(per_token), quartiles, self.config.width) / chances(batch, self.config.seed)


def gaussian_odds(perplexity: np.ndarray, quartiles: list[float], width: float = 4.5) -> np.ndarray:
    """exp(-((ppl - Q2) / Q2)^2 / width); BERTIN's probability is .78 of this at width 4.5."""
    middle = quartiles[1]
    return np.exp(-(((perplexity - middle) / middle) ** 2) / width)


def stepwise_odds(perplexity: np.ndarray, quartiles: list[float], width: float = 0.0) -> np.ndarray:
    """One over the width of the quartile: Q1 | Q2 - Q1 | Q3 - Q2 | 10 Q3."""
    low, middle, high = quartiles
    ranges = np.maximum([low, middle - low, high - middle, 10 * high], 1e-12)
    return np.where(np.isnan(perplexity), np.nan, 1 / ranges[np.searchsorted(quartiles, perplexity, side="right")])


class LossDifference(_ByLosses):
    """Mean over tokens of log p_teacher - log p_reference (MiniPLM, eq. 5), over whole documents."""

    config: Difference

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """See that the two can be compared.

        Raises:
            UserError: they have different tokenizers.
        """
        same_tokenizer(self.store)
        return {}

    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """What the teacher knows that the reference does not, in nats per token."""
        teacher, reference = self.losses(batch).per_token
        return reference - teacher
