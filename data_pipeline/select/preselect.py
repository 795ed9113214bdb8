"""PreSelect: which documents foretell how good models are, and a classifier that finds more of their kind (arXiv 2503.00808)."""

from typing import Any

import numpy as np

from regrowth.data_pipeline.phases.curate import save
from regrowth.data_pipeline.select.config import PreSelect, essence
from regrowth.data_pipeline.select.learned import _ByFastText
from regrowth.data_pipeline.select.loss_store import LossStore, Tell
from regrowth.data_pipeline.select.pool import Pool, Sample
from regrowth.data_pipeline.select.record import model_mark
from regrowth.data_pipeline.select.strength import STRENGTH, bootstrap_confidence, group_means, load_models, predictive_strength
from regrowth.data_pipeline.transform_config import Strength
from regrowth.errors import UserError
from regrowth.files import write_json

_SHOWN = 20  # groups of the greatest and the least strength


class ByPredictiveStrength(_ByFastText):
    """Positives are documents of full strength; negatives are as many of the least."""

    config: PreSelect
    _store: LossStore | None = None
    _given_flops = 0.0

    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """Sample the pool, take its strength (or the scores that a `strength` transform gave it), label, train.

        Raises:
            UserError: too few models or documents, losses that are no numbers, or no document of full strength.
        """
        config = self.config
        sample = pool.sample(config.documents, config.seed, config.per, config.groups)
        strength, confidence, findings = self._strength(pool, sample, tell)
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

    def _strength(self, pool: Pool, sample: Sample, tell: Tell) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
        config = self.config
        if (given := self._given(pool)) is not None and not config.confidence:
            self._given_flops = 1e6 * pool.pipeline.counts().get(STRENGTH, {}).get("megaflops", 0)
            return sample.score(STRENGTH).astype(np.float64), None, {"from": f"the pool's score {STRENGTH}, of {given}"}
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
            positives = order[-max(1, round((config.positive_share or 0.5) * len(order))) :] if order else []
        else:
            positives = [row for row in order if judged[row] >= 1]
        if config.labels == "group" and positives:  # a group is good or bad as a whole: the one at the cut is neither
            cut = judged[positives[0]]
            positives = [row for row in positives if judged[row] > cut] or positives
            order = [row for row in order if judged[row] < cut or row in set(positives)]
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
        return super().flops + self._given_flops + (self._store.flops if self._store else 0.0)

    def _given(self, pool: Pool) -> str | None:
        """The models of the pool's own strength, if it was taken as this selector would take it.

        Raises:
            UserError: it was taken otherwise.
        """
        for number, transform in enumerate(pool.pipeline.config.transforms):
            if not isinstance(transform, Strength):
                continue
            mine, theirs = (essence(c)["losses"] | {"weights": c.weights} for c in (self.config, transform))
            begin = f"transforms.{number}.models."
            there = {key.removeprefix(begin): mark for key, mark in pool.pipeline.plan["inputs"].items() if key.startswith(begin)}
            wanted = {
                model.name: f"{model_mark(model.path)} {score!r}"
                for model, score in zip(*load_models(self.config.models_file, self.config.target), strict=True)
            }
            if there != wanted or mine != theirs:
                raise UserError(f"{pool.root}: its documents have a strength of other models, scores or settings than the selector's (models_file, target, weights, losses). "
                                "Make them alike, or take the transform `strength` out of the pool's recipe.")  # fmt: skip
            return ", ".join(there)
        return None

    def close(self) -> None:
        """Free the models."""
        super().close()
        if self._store:
            self._store.close()
            self._store = None
