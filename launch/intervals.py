"""Means of paired differences with their 95% intervals."""

import math
from collections.abc import Sequence

import numpy as np

# Student's t at 97.5% by the number of values; beyond, by a series in its degrees of freedom, right to a thousandth.
_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval (Student's t); infinite for a single value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.inf
    return float(np.mean(values)), _T.get(n, 1.96 + 2.4 / (n - 1) + 2.8 / (n - 1) ** 2) * float(np.std(values, ddof=1)) / math.sqrt(n)


def spell(values: Sequence[float], digits: int = 4) -> str:
    """Mean and interval of differences, for a table."""
    mean, half = interval(values)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}" if math.isfinite(half) else f"{mean:+.{digits}f}"
