"""Predictive strength (PreSelect, arXiv 2503.00808): how well the order of models' losses on a document foretells the order of their scores.

With models from worst to best and C_i the normalised loss of model i: S = sum over i < j of w_ij [C_i > C_j] / sum of w_ij. All w are 1 in the paper, where a tie counts
nothing. A document without all its losses has no strength.
"""

from pathlib import Path

import numpy as np

from regrowth.data_pipeline.select.config import ModelSet, ScoredModel
from regrowth.errors import UserError, nearest
from regrowth.settings import load

STRENGTH = "strength"  # the name of the score


def predictive_strength(losses: np.ndarray, scores: np.ndarray | None = None) -> np.ndarray:
    """float64 [documents]: the share of pairs of models that a document's losses order as their scores do; NaN where a loss is.

    Args:
        losses: float [models, documents], in any unit that is the same for all models; models from worst to best.
        scores: float [models], ascending: pairs then weigh the distance of their scores. None: all weigh alike.
    """
    worse, better = np.triu_indices(len(losses), 1)
    weights = np.ones(len(worse)) if scores is None else np.asarray(scores, np.float64)[better] - np.asarray(scores, np.float64)[worse]
    agree = losses[worse] > losses[better]
    strength = np.where(agree.all(0), 1.0, weights @ agree / weights.sum())  # whole is whole, however the weights round
    return np.where(np.isnan(losses).any(0), np.nan, strength)


def bootstrap_confidence(losses: np.ndarray, full: float = 1.0, rounds: int = 200, seed: int = 0) -> np.ndarray:
    """float64 [documents]: in what share of resamples of the models (with replacement, at least two different) the strength is at least `full`.

    Pairs of a model and itself say nothing, and are left out. What is whole for all models is whole for each resample, so the number only parts those that are not.
    """
    rng, count = np.random.default_rng(seed), np.zeros(losses.shape[1])
    for _ in range(rounds):
        while len(chosen := np.unique(rng.integers(0, len(losses), len(losses)))) < 2:
            pass
        count += predictive_strength(losses[chosen]) >= full
    return np.where(np.isnan(losses).any(0), np.nan, count / rounds)


def group_means(values: np.ndarray, groups: list[str]) -> dict[str, float]:
    """The mean of each group's values, without NaN; groups of nothing else are left out."""
    found: dict[str, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        if value == value:
            found.setdefault(group, []).append(value)
    return {group: float(np.mean(its)) for group, its in sorted(found.items())}


def load_models(path: Path, target: str | None) -> tuple[list[ScoredModel], np.ndarray]:
    """Models from worst to best on a target, and their scores, ascending.

    Raises:
        UserError: fewer than two models, a score is missing, or all are equal.
    """
    models = load(ModelSet, path)
    known = sorted({name for model in models.models for name in model.scores})
    if target is None:
        if len(known) != 1:
            raise UserError(f"{path}: the models have scores of {len(known)} targets ({', '.join(known)}); name one with target.")
        target = known[0]
    if target not in known:
        raise UserError(f"{path}: no model has a score of the target {target}; {nearest(target, known)}")
    if missing := [model.name for model in models.models if target not in model.scores]:
        raise UserError(
            f"{path}: {', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no score of {target}. Give it, or leave the model out."
        )
    sign = 1.0 if models.higher_is_better else -1.0
    ranked = sorted(models.models, key=lambda model: (sign * model.scores[target], model.name))
    scores = np.array([sign * model.scores[target] for model in ranked])
    if (np.diff(scores) == 0).any():
        equal = [m.name for m, d in zip(ranked, np.diff(scores), strict=False) if d == 0]
        raise UserError(
            f"{path}: {equal[0]} and the next have the same score of {target}, so that neither is the better one. Leave one of them out."
        )
    return ranked, scores
