"""Multiple choice by losses: the answer that a model finds likeliest for its length. Reads the forms that evaluation sets have as JSON lines.

query, choices, gold                    what is asked, the answers, the right one's number
context_options, continuation, gold     the beginnings of which one fits the continuation
activity_and_ctx, endings, label        HellaSwag's
sentence_good, sentence_bad             BLiMP's
question, choice0.., answer             MMLU's
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from regrowth.data_pipeline.document import sound_text
from regrowth.data_pipeline.select.loss_model import LossModel
from regrowth.data_pipeline.sources.base import read_lines
from regrowth.data_pipeline.sources.paths import open_packed
from regrowth.errors import UserError

_LINE_BYTES = 1 << 24


class Item(NamedTuple):
    """A question: beginning and end of each answer, and which is right. What is judged is the end, after its beginning."""

    answers: list[tuple[str, str]]
    right: int


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first items of a set.

    Raises:
        UserError: the file cannot be read, or an item has none of the known forms.
    """
    found: list[Item] = []
    try:
        with open_packed(str(path)) as stream:
            for offset, line in read_lines(stream, _LINE_BYTES):
                if limit is not None and len(found) >= limit:
                    break
                if line is None or not line.strip():
                    continue
                try:
                    found.append(_item(json.loads(line)))
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise UserError(f"{path}, byte {offset}: no multiple-choice item of a known form ({type(error).__name__}: {error}). Known: query/choices/gold, "
                                    "context_options/continuation/gold, HellaSwag, BLiMP, MMLU.") from error  # fmt: skip
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not found:
        raise UserError(f"{path}: holds no item.")
    return found


def _item(row: dict[str, Any]) -> Item:
    if "sentence_good" in row:
        item = Item([("", row["sentence_good"]), ("", row["sentence_bad"])], 0)
    elif "context_options" in row:
        item = Item([(begin, f" {row['continuation'].lstrip()}") for begin in row["context_options"]], int(row["gold"]))
    elif "endings" in row:
        item = Item([(row["activity_and_ctx"], f" {end}") for end in row["endings"]], int(row["label"]))
    elif "choice0" in row:
        ends = [row[f"choice{n}"] for n in range(26) if f"choice{n}" in row]
        item = Item([(f"Question: {row['question']}\nAnswer:", f" {end}") for end in ends], int(row["answer"]))
    else:
        query = row["query"].rstrip()
        ask = f"{query}\nAnswer:" if query.startswith("Question:") else query
        item = Item([(ask, f" {end}") for end in row["choices"]], int(row["gold"]))
    item = Item([(sound_text(begin), sound_text(end)) for begin, end in item.answers], item.right)
    if not 0 <= item.right < len(item.answers) or len(item.answers) < 2:
        raise ValueError(f"answer {item.right} of {len(item.answers)}")
    return item


def accuracy(model: LossModel, items: list[Item]) -> tuple[float, float]:
    """The share of items whose right answer has the least loss per character, and what guessing would have. Of k answers that tie for the least, each is right by 1/k; an item with a loss
    that is no number is wrong.

    Raises:
        UserError: no item has losses that are numbers.
    """
    whole = model.score([begin + end for item in items for begin, end in item.answers]).nats
    begins = model.score([begin for item in items for begin, _ in item.answers]).nats
    lengths = np.array([len(end) for item in items for _, end in item.answers])
    losses = (whole - np.nan_to_num(begins)) / lengths
    at, right, known = 0, 0.0, 0
    for item in items:
        its = losses[at : at + len(item.answers)]
        at += len(item.answers)
        if np.isfinite(its).all():
            known += 1
            right += (its[item.right] == its.min()) / (its == its.min()).sum()
    if not known:
        raise UserError(
            f"{model.key} = {model.path}: its losses on multiple choice are no numbers; the model has diverged, or its weights are damaged."
        )
    return right / len(items), float(np.mean([1 / len(item.answers) for item in items]))
