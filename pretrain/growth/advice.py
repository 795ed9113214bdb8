"""When to grow: what was published of it, as formulas."""

import math

# FLOPs from scratch over FLOPs grown, less 1, at equal loss and with the base's cost: 410M to 1.1B parameters, and 7B (arXiv 2405.15319).
PUBLISHED_SPEEDUPS = (0.491, 0.546)


# Mean accuracy in percent of a grown mixture of experts, by the steps that its base was trained (orthogonal growth, arXiv 2510.08008).
SUNK = ((0, 38.79), (88_000, 48.99))


def chinchilla_tokens(parameters: float) -> float:
    """Tokens that are best for a model at the compute they take: 20 a parameter (Hoffmann et al. 2022, arXiv 2203.15556)."""
    return 20.0 * parameters


def growth_tokens(parameters: float, compute: float) -> float:
    """Tokens of the small model after which to stack: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 (Du et al. 2024, arXiv 2405.15319).

    Args:
        parameters: N of the grown model, without embeddings.
        compute: C, FLOPs that the grown model would take from scratch.
    """
    return 10.0 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(compute) - 5.74)
