"""Selectors that learn from examples: fastText classifiers, and a regression on embeddings."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.phases.curate import load, save
from regrowth.data_pipeline.select.classifier import MODEL, WANTED, train_classifier
from regrowth.data_pipeline.select.config import Classifier, FastTextTraining, Regression
from regrowth.data_pipeline.select.labelled import read_labelled, texts_of
from regrowth.data_pipeline.select.loss_store import Tell
from regrowth.data_pipeline.select.measures import platt, roc_auc
from regrowth.data_pipeline.select.pool import Pool
from regrowth.data_pipeline.select.selector import Selector
from regrowth.data_pipeline.transform_config import Similarity
from regrowth.data_pipeline.transforms.fasttext_score import load_fasttext, probabilities
from regrowth.errors import UserError

if TYPE_CHECKING:
    from regrowth.data_pipeline.rephrase.similarity import SimilarityCheck

_WORD = 6  # bytes, with the space behind it
_LEAST = 16  # labelled documents of a regression


class _ByFastText(Selector):
    """Base of those that end in a fastText classifier; `_training` says how it is trained."""

    _model: Any = None
    _trained = 0  # characters

    @property
    def _training(self) -> FastTextTraining:
        return self.config.training

    def learn(self, positives: list[str], negatives: list[str]) -> dict[str, Any]:
        """Train the classifier."""
        self._trained = sum(map(len, positives)) + sum(map(len, negatives))
        return train_classifier(positives, negatives, self._training, self.folder)

    def warm(self) -> None:
        """Load the classifier."""
        if self._model is None:
            self._model = load_fasttext(str(self.folder / MODEL), "selector.path")

    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """The probability of the wanted class."""
        self.warm()
        texts = batch.column("text")
        self.counts["bytes"] += pc.sum(pc.binary_length(texts)).as_py() or 0
        found = probabilities(self._model, texts, WANTED, hide_labels=True)  # pyright: ignore[reportArgumentType]
        if self._training.calibrate:
            found = platt(found, *self.describe()["findings"].get("platt", (1.0, 0.0)))
        return found

    @property
    def flops(self) -> float:
        """About: each unigram and n-gram is a vector that is added up; in training it is changed as well."""
        per_byte = 2.0 * self._training.dim * self._training.word_ngrams / _WORD
        return per_byte * (2 * self._training.epochs * self._trained + self.counts["bytes"])

    def close(self) -> None:
        """Free the classifier."""
        self._model = None


class ByClassifier(_ByFastText):
    """Wanted and unwanted examples are given, or are the target's text and the pool's."""

    config: Classifier

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """Gather the examples and train.

        Raises:
            UserError: all examples are of one class, or there are too few.
        """
        config = self.config
        if config.labelled is not None:
            rows = read_labelled(config.labelled, "selectors.labelled", "label")
            labels = sorted({str(label) for _, label in rows})
            if config.positive_label not in labels or len(labels) < 2:
                raise UserError(f"selectors.labelled = {config.labelled}: its labels are {', '.join(labels)}; positive_label = {config.positive_label} and at least one "
                                "other are needed to tell the classes apart.")  # fmt: skip
            positives = [text for text, label in rows if str(label) == config.positive_label]
            negatives = [text for text, label in rows if str(label) != config.positive_label]
        else:
            if config.positives is not None:
                positives = texts_of(config.positives, "selectors.positives")
            else:
                assert target is not None
                positives = target.sample(config.examples, config.training.seed).texts
            negatives = (
                texts_of(config.negatives, "selectors.negatives")
                if config.negatives is not None
                else pool.sample(config.examples, config.training.seed).texts
            )
        return self.learn(positives[: config.examples], negatives[: config.examples])


class ByRegression(Selector):
    """A number for each document, as people or a model gave it to others; from the mean of a sentence model's states by ridge regression."""

    config: Regression
    _embedder: "SimilarityCheck | None" = None
    _embedded = 0

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """Solve for the weights.

        Raises:
            UserError: a label is no number, there are too few, or all are equal.
        """
        rows = read_labelled(self.config.labelled, "selectors.labelled", self.config.field)
        for _, value in rows:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"selectors.labelled = {self.config.labelled}: {self.config.field} = {value!r} is no number.")
        y = np.array([value for _, value in rows], np.float64)
        if len(y) < _LEAST or y.std() == 0:
            raise UserError(f"selectors.labelled = {self.config.labelled}: {len(y)} documents with {len(set(y.tolist()))} different numbers; a regression needs at least "
                            f"{_LEAST}, of which some differ.")  # fmt: skip
        x = self._embed([text for text, _ in rows])
        sound = ~np.isnan(x.sum(axis=1))  # an empty text has no embedding
        rows, x, y = [row for row, good in zip(rows, sound.tolist(), strict=True) if good], x[sound], y[sound]
        if len(y) < _LEAST or y.std() == 0:
            raise UserError(
                f"selectors.labelled = {self.config.labelled}: {len(y)} documents have embeddings; a regression needs at least {_LEAST}, of which some differ."
            )
        held = np.array([xxhash.xxh3_64_intdigest(text.encode(), self.config.seed) < self.config.heldout * 2**64 for text, _ in rows])
        middle, scale = x[~held].mean(0), x[~held].std(0) + 1e-6
        z = (x - middle) / scale
        train = z[~held]
        weights = np.linalg.solve(
            train.T @ train + self.config.ridge * len(train) * np.eye(train.shape[1]), train.T @ (y[~held] - y[~held].mean())
        )
        save(self.folder / "weights.npy", np.stack([weights / scale, middle]))
        bias = float(y[~held].mean())
        said = z[held] @ weights + bias
        findings: dict[str, Any] = {"examples": len(y), "without_embedding": int((~sound).sum()), "bias": bias, "held_out": int(held.sum())}
        if held.sum() >= 2:
            findings["r_squared"] = float(1 - ((said - y[held]) ** 2).sum() / max(((y[held] - y[held].mean()) ** 2).sum(), 1e-12))
            if 0 < (wanted := y[held] > np.median(y)).sum() < held.sum():
                findings["roc_auc_above_median"] = roc_auc(said, wanted)
        return findings

    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """The number that the regression gives."""
        weights, middle = np.asarray(load(self.folder / "weights.npy"))
        return (self._embed(batch.column("text").to_pylist()) - middle) @ weights + self.describe()["findings"]["bias"]

    def _embed(self, texts: list[str]) -> np.ndarray:
        if self._embedder is None:
            from regrowth.data_pipeline.rephrase.similarity import SimilarityCheck  # torch takes seconds to import

            self._embedder = SimilarityCheck(Similarity(path=self.config.model, least=0.0, device=self.config.device), "selectors.model")
        begins = [text[: self.config.characters] for text in texts]
        self.counts["characters embedded"] += sum(map(len, begins))
        return self._embedder.embed(begins).astype(np.float64)

    @property
    def flops(self) -> float:
        """About: two for each of the sentence model's parameters and token, of four characters."""
        return 2.0 * self._embedder.parameters * self.counts["characters embedded"] / 4 if self._embedder else 0.0

    def close(self) -> None:
        """Free the sentence model."""
        self._embedder = None
