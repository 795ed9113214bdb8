"""Growth of the vocabulary: rows for new tokens, made of the rows of what they consist of."""

import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from regrowth.errors import UserError
from regrowth.pretrain.growth.dims import dims, resized
from regrowth.pretrain.growth.maps import Fresh, Term, pick
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator
from regrowth.pretrain.model_config import ModelConfig


class GrowVocabulary(GrowthOperator):
    """New rows of embedding and head behind the old ones: each the mean of its constituents' rows.

    `constituents` is a JSON file with a list for each new token of the old ids that its text was; without it, new rows begin as in a new model.
    """

    op: Literal["vocabulary"] = "vocabulary"
    size: Annotated[int, Field(ge=1)]
    constituents: Path | None = None

    def grow_config(self, config: ModelConfig) -> ModelConfig:
        """The vocabulary's size."""
        if self.size <= config.vocabulary:
            raise ValueError(f"vocabulary: size = {self.size} is no growth of {config.vocabulary}")
        return resized(config, vocabulary=self.size)

    def terms(self, target: TensorName, config: ModelConfig, grown: ModelConfig) -> list[Term]:
        """Old rows as they are; new ones as a sum of one term for the first constituent of each, one for the second, and so on."""
        if dims(target)[0] != "vocabulary":
            return [Term(target)]
        old, added = config.vocabulary, self.size - config.vocabulary
        parts = [Term(target, {0: pick([*range(old), *[-1] * added])})]
        if self.constituents is None:
            fresh = Fresh(config.init_std, (self.size, config.width), str(target))
            return [*parts, Term(fresh, {0: pick([*[-1] * old, *range(old, self.size)])})]
        lists = self._lists(self.constituents, old, added)
        for j in range(max(map(len, lists))):
            index = [-1] * old + [ids[j] if j < len(ids) else -1 for ids in lists]
            scale = [0.0] * old + [1 / max(len(ids), 1) for ids in lists]
            parts.append(Term(target, {0: pick(index, np.array(scale))}, gradient=0.0))
        return parts

    def _lists(self, path: Path, old: int, added: int) -> list[list[int]]:
        try:
            lists = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"growth constituents = {path}: {error}. Give a JSON list with a list of old ids for each new token."
            ) from error
        good = isinstance(lists, list) and len(lists) == added
        if not good or not all(isinstance(ids, list) and ids and all(isinstance(i, int) and 0 <= i < old for i in ids) for ids in lists):
            raise UserError(
                f"growth constituents = {path}: it has to hold {added} lists, one for each new token, of ids from 0 to {old - 1}."
            )
        return lists
