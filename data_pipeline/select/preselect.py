"""PreSelect: which documents foretell how good models are, and a classifier that finds more of their kind (arXiv 2503.00808)."""

from typing import Any

import numpy as np

from regrowth.data_pipeline.phases.curate import save
from regrowth.data_pipeline.select.config import PreSelect
from regrowth.data_pipeline.select.learned import _ByFastText
from regrowth.data_pipeline.select.loss_store import LossStore, Tell
from regrowth.data_pipeline.select.pool import Pool, Sample
from regrowth.data_pipeline.select.strength import STRENGTH, bootstrap_confidence, group_means, load_models, predictive_strength
from regrowth.errors import UserError
from regrowth.files import write_json

_SHOWN = 20  # groups of the greatest and the least strength


class ByPredictiveStrength(_ByFastText):
    """Positives are documents of full strength; negatives are as many of the least."""

    config: PreSelect
    _store: LossStore | None = None

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """Sample the pool, take its strength (or the scores that a `strength` transform gave it), label, train.

        Raises:
            UserError: too few models or documents, losses that are no numbers, or no document of full strength.
        """
        config = self.config
        sample = pool.sample(config.documents, config.seed, config.per, config.groups)
        strength, confidence, findings = self._strength(sample, tell)
        known = ~np.isnan(strength)
        if not known.any():
            raise UserError(
                f"{pool.root}: none of {len(sample)} sampled documents has losses of all models. See `findings` of the models, and losses.dtype."
            )
        means = group_means(strength, sample.groups)
        ranked = sorted(means, key=lambda group: (-means[group], group))
        write_json(self.folder / "groups.json", {group: means[group] for group in ranked})
        save(self.folder / "strength.npy", strength)
        positives, negatives = self._labels(sample, strength, confidence, means)
        findings |= {
            "documents": len(sample),
            "without_losses": int((~known).sum()),
            "mean_strength": float(strength[known].mean()),
            "of_full_strength": int((strength[known] >= 1).sum()),
            "groups": len(means),
            "strongest_groups": {group: means[group] for group in ranked[:_SHOWN]},
            "weakest_groups": {group: means[group] for group in ranked[::-1][:_SHOWN]},
        }
        return findings | self.learn([sample.texts[row] for row in positives], [sample.texts[row] for row in negatives])

    def _strength(self, sample: Sample, tell: Tell) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
        config = self.config
        given = sample.score(STRENGTH)
        if len(given) and not np.isnan(given).all() and not config.confidence:
            return given.astype(np.float64), None, {"from": f"the pool's score {STRENGTH}"}
        models, scores = load_models(config.models_file, config.target)
        self._store = LossStore([(f"{config.models_file}: {model.name}", model.path) for model in models], config.losses)
        self._store.counts = self.counts
        losses = self._store.losses(sample.texts, sample.hashes, tell)
        bits = losses.bits_per_character
        strength = predictive_strength(bits, scores if config.weights == "gaps" else None)
        confidence = bootstrap_confidence(bits, seed=config.seed) if config.confidence else None
        said = {
            model.name: {"score": float(score), "bits_per_character": float(np.nanmean(row)), "no_number": int(np.isnan(row).sum())}
            for model, score, row in zip(models, scores, bits, strict=True)
        }
        return strength, confidence, {"from": "models", "models": said}

    def _labels(
        self, sample: Sample, strength: np.ndarray, confidence: np.ndarray | None, means: dict[str, float]
    ) -> tuple[list[int], list[int]]:
        """Rows of positives and negatives. What no rule parts, the texts' hashes do."""
        config = self.config
        judged = strength if config.labels == "document" else np.array([means.get(group, np.nan) for group in sample.groups])
        judged = np.where(np.isnan(strength), np.nan, judged)
        order = sorted(np.flatnonzero(~np.isnan(judged)).tolist(), key=lambda row: (judged[row], sample.hashes[row]))
        if config.positive_share is not None or config.labels == "group":
            positives = order[-max(1, round((config.positive_share or 0.5) * len(order))) :]
        else:
            positives = [row for row in order if judged[row] >= 1]
        if confidence is not None:
            positives = [row for row in positives if confidence[row] >= config.confidence]
        chosen = set(positives)
        negatives = [row for row in order if row not in chosen][: len(positives)]
        if not positives or not negatives:
            what = "positive" if not positives else "negative"
            raise UserError(f"selectors: preselect: no document is {what}: of {len(order)} documents the strength is {judged[order[0]]:.3f} to {judged[order[-1]]:.3f}. "
                            "Set positive_share (the best so many are positives), take models that differ more, or more documents.")  # fmt: skip
        return positives, negatives

    @property
    def flops(self) -> float:
        """The models' forward passes, and fastText's."""
        return super().flops + (self._store.flops if self._store else 0.0)

    def close(self) -> None:
        """Free the models."""
        super().close()
        if self._store:
            self._store.close()
            self._store = None
