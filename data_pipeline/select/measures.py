"""How well scores part two classes, and how far probabilities can be taken at their word. In numpy: these are a line each, and nothing else here would need scikit-learn."""

import numpy as np


def roc_auc(scores: np.ndarray, wanted: np.ndarray) -> float:
    """The chance that a wanted example scores above an unwanted one, ties counting half (Mann-Whitney)."""
    order = np.argsort(scores, kind="stable")
    _, first, counts = np.unique(scores[order], return_index=True, return_counts=True)
    ranks = np.repeat(first + (counts + 1) / 2, counts)
    positives = wanted[order].sum()
    return float((ranks[wanted[order]].sum() - positives * (positives + 1) / 2) / (positives * (len(scores) - positives)))


def _by_threshold(scores: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds from the greatest score down, and precision and recall of what is at or above each."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(wanted[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    return scores[order][last], found[last] / (last + 1), found[last] / max(int(wanted.sum()), 1)


def average_precision(scores: np.ndarray, wanted: np.ndarray) -> float:
    """The area under the precision-recall steps."""
    _, precision, recall = _by_threshold(scores, wanted)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def best_threshold(scores: np.ndarray, wanted: np.ndarray) -> float:
    """The threshold of the greatest F1."""
    thresholds, precision, recall = _by_threshold(scores, wanted)
    return float(thresholds[np.argmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))])


def calibration_error(probabilities: np.ndarray, wanted: np.ndarray, bins: int = 10) -> float:
    """The mean distance between what is said and what is so, over ten bins of what is said (ECE)."""
    of = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [abs(probabilities[of == b].mean() - wanted[of == b].mean()) * (of == b).mean() for b in range(bins) if (of == b).any()]
    return float(sum(gaps))


def platt(probabilities: np.ndarray, slope: float, offset: float) -> np.ndarray:
    """Probabilities whose log odds are stretched and moved."""
    return 1 / (1 + np.exp(-(slope * _log_odds(probabilities) + offset)))


def fit_platt(probabilities: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the log odds by which examples are likeliest, with Platt's smoothed targets; Newton's method. The slope stays positive, so that no order is changed."""
    positives, negatives = int(wanted.sum()), int((~wanted).sum())
    target = np.where(wanted, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    x = np.stack([_log_odds(probabilities), np.ones(len(probabilities))])
    at = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-at @ x))
        step = np.linalg.solve((x * (p * (1 - p))) @ x.T + 1e-6 * np.eye(2), x @ (p - target))
        at = at - np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return (float(at[0]), float(at[1])) if at[0] > 0 else (1.0, 0.0)


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    p = np.clip((probabilities + 1e-6) / (1 + 2e-5), 1e-9, 1 - 1e-9)  # fastText's go up to 1 + 1e-5
    return np.log(p / (1 - p))
