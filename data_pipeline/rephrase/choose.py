"""Which style a document gets: by its domain, by a score of its quality, by weights and chance. The same in every run and on every machine."""

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.transform_config import Rephrase, StyleRule, Styles
from regrowth.data_pipeline.transforms.base import score_of


def styles_of(batch: pa.RecordBatch, config: Rephrase) -> list[str]:
    """For each document of a batch its style; "" where it is left as it is."""
    domains, ids = batch.column("domain").to_pylist(), batch.column("id").to_pylist()
    scores = {rule.score: score_of(batch.column("scores"), rule.score, np.nan) for rule in config.rules if rule.score}
    found = []
    for row, (domain, identity) in enumerate(zip(domains, ids, strict=True)):
        if config.domains and domain not in config.domains:
            found.append("")
            continue
        fits = (rule for rule in config.rules if _fits(rule, domain, float(scores[rule.score][row]) if rule.score else None))
        rule = next(fits, None)
        found.append(drawn(identity, config.styles if rule is None else rule.styles))
    return found


def _fits(rule: StyleRule, domain: str, score: float | None) -> bool:
    if rule.domains and domain not in rule.domains:
        return False
    if score is None:
        return True
    # A document without the score compares false with everything.
    # Scores are kept in fp32, and so is what they are compared with.
    least, below = (None if bound is None else float(np.float32(bound)) for bound in (rule.at_least, rule.below))
    return score == score and (least is None or score >= least) and (below is None or score < below)


def drawn(document: str, styles: Styles) -> str:
    """One of some styles by their weights, from a document's id; "" of none."""
    if not styles:
        return ""
    names, bounds = list(styles), np.cumsum(list(styles.values()))
    draw = xxhash.xxh3_64_intdigest(f"style\x1f{document}".encode()) / 2**64
    return names[int(np.searchsorted(bounds, draw * bounds[-1], side="right"))]
