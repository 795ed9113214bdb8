"""A fastText classifier of two classes: trained, held to examples it has not seen, written with what was found."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from regrowth.data_pipeline.select.config import FastTextTraining
from regrowth.data_pipeline.select.fasttext_process import train_in_process
from regrowth.data_pipeline.select.measures import average_precision, best_threshold, calibration_error, fit_platt, platt, roc_auc
from regrowth.data_pipeline.transforms.fasttext_score import LABEL, NO_LABEL, load_fasttext, probabilities
from regrowth.errors import UserError
from regrowth.files import atomic_path

WANTED, UNWANTED = "__label__1", "__label__0"
MODEL, QUANTISED = "model.bin", "model.ftz"
_LEAST = 8  # examples of each class


def one_line(text: str) -> str:
    """A document as fastText's training reads it: on one line, and nothing in it that would be taken for a label. Other white space, and NUL, part words for fastText as they are."""
    return text.replace("\n", " ").replace(LABEL, NO_LABEL).encode("utf-8", "replace").decode()  # surrogates, of JSON's escapes


def train_classifier(positives: list[str], negatives: list[str], config: FastTextTraining, folder: Path) -> dict[str, Any]:
    """Train on the most that gives classes of one size, write the model, and say how well it tells what was held out.

    Whether an example is held out follows from its content, so that the same text never stands on both sides. One thread: more would make other weights each time.

    Raises:
        UserError: a class has too few examples.
    """
    examples = [dict.fromkeys(one_line(text).strip() for text in side) for side in (positives, negatives)]
    both = examples[0].keys() & examples[1].keys()
    sides = [[text for text in side if text and text not in both] for side in examples]
    for side, name in zip(sides, ("positive", "negative"), strict=True):
        if len(side) < _LEAST:
            raise UserError(f"the classifier has {len(side)} {name} examples (empty, double, and those of both classes left out); it needs at least {_LEAST}. "
                            "Give more documents, or loosen what an example is.")  # fmt: skip
    held = [[_draw(text, config.seed) < config.heldout for text in side] for side in sides]
    train = [[text for text, out in zip(side, mask, strict=True) if not out] for side, mask in zip(sides, held, strict=True)]
    size = min(map(len, train))
    path = folder / ".train.txt"
    drawn = [sorted(side, key=lambda text: _draw(text, config.seed + 1))[:size] for side in train]
    rows = [f"{label} {text}\n" for label, side in zip((WANTED, UNWANTED), drawn, strict=True) for text in side]
    np.random.default_rng(config.seed).shuffle(rows)
    path.write_text("".join(rows), encoding="utf-8")
    arguments = {"input": str(path), "epoch": config.epochs, "lr": config.lr, "wordNgrams": config.word_ngrams, "dim": config.dim, "bucket": config.buckets,
                 "minCount": config.min_count, "thread": 1, "seed": config.seed, "verbose": 0}  # fmt: skip
    try:
        with contextlib.ExitStack() as stack:
            small = str(stack.enter_context(atomic_path(folder / QUANTISED))) if config.quantise else None
            train_in_process(arguments, str(stack.enter_context(atomic_path(folder / MODEL))), small)
    finally:
        path.unlink(missing_ok=True)
    unseen = [[text for text, out in zip(side, mask, strict=True) if out] for side, mask in zip(sides, held, strict=True)]
    findings = {"examples_of_each_class": size, **_held_to(load_fasttext(str(folder / MODEL), "the model"), unseen)}
    if config.quantise:
        told = _held_to(load_fasttext(str(folder / QUANTISED), "the quantised model"), unseen)
        findings["quantised"] = {"megabytes": (folder / QUANTISED).stat().st_size / 1e6, "roc_auc": told.get("roc_auc")}
    return findings


def _held_to(model: Any, unseen: list[list[str]]) -> dict[str, Any]:
    """How well a model tells what it has not seen; nothing where a class has none."""
    if not all(unseen):
        return {"held_out": [len(side) for side in unseen]}
    scores = probabilities(model, pa.array([text for side in unseen for text in side], pa.large_string()), WANTED)  # pyright: ignore[reportArgumentType]
    wanted = np.repeat([True, False], [len(side) for side in unseen])
    slope, offset = fit_platt(scores, wanted)
    return {
        "held_out": [len(side) for side in unseen],
        "roc_auc": roc_auc(scores, wanted),
        "average_precision": average_precision(scores, wanted),
        "threshold_of_best_f1": best_threshold(scores, wanted),
        "calibration_error": calibration_error(scores, wanted),
        "calibration_error_calibrated": calibration_error(platt(scores, slope, offset), wanted),
        "platt": [slope, offset],
    }


def _draw(text: str, seed: int) -> float:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed) / 2**64
