"""Models' losses on documents, each taken once: what was taken stands in a file that outlives whoever took it."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from regrowth.data_pipeline.select.config import Losses
from regrowth.data_pipeline.select.loss_model import LossModel
from regrowth.data_pipeline.sqlite_file import SqliteFile
from regrowth.errors import UserError
from regrowth.files import fingerprint

_TABLE = """
create table if not exists losses (
    model text not null, document blob not null, nats real, characters integer not null, tokens integer not null, run integer not null,
    primary key (model, document)
) without rowid
"""
_SIZES = "create table if not exists sizes (model text primary key, parameters integer not null) without rowid"
_VERSION = 1  # changes when losses come to be taken in another way
_KEPT_CHARACTERS = 1 << 18  # of documents that are scored before their losses are written: what a kill may cost

_FEW = 8  # documents without a loss that are no sign of a broken model
_KINDS = (np.float64, np.int64, np.int64, np.int64)

Tell = Callable[[str, float, float], None]  # what is being done, how much is done, of how much


class DocumentLosses(NamedTuple):
    """Of some models on some documents."""

    nats: np.ndarray  # float64 [models, n], NaN where there is none
    characters: np.ndarray  # int64 [models, n]: that were predicted
    tokens: np.ndarray  # int64 [models, n]
    run: np.ndarray  # int64 [models, n]: tokens that went through the model

    @property
    def bits_per_character(self) -> np.ndarray:
        """float64 [models, n]: what makes models of different tokenizers comparable."""
        return self.nats / np.maximum(self.characters, 1) / np.log(2)

    @property
    def per_token(self) -> np.ndarray:
        """float64 [models, n]: nats."""
        return self.nats / np.maximum(self.tokens, 1)


class LossStore:
    """Models and what they said.

    Args:
        models: (key of the config, path) of each.
    """

    def __init__(self, models: list[tuple[str, str]], config: Losses) -> None:
        self.config = config
        self.models = [LossModel(path, config, key) for key, path in models]
        self.file = SqliteFile(config.cache, "a cache of losses", "losses.cache", (_TABLE, _SIZES), 1)
        self.counts: Counter[str] = Counter()
        self.flops = 0.0  # that the losses cost which were asked for, whoever took them: two for each parameter and token
        self._held: list[LossModel] = []

    def losses(self, texts: list[str], hashes: list[bytes], tell: Tell = lambda *_: None) -> DocumentLosses:
        """The losses of all models on documents with these content hashes.

        Raises:
            UserError: a model says NaN of every document that it was shown.
        """
        out = DocumentLosses(*(np.zeros((len(self.models), len(texts)), kind) for kind in _KINDS))
        for row, model in enumerate(self.models):
            for values, column in zip(self._of_model(model, texts, hashes, tell), out, strict=True):
                column[row] = values
            if len(texts):
                self.flops += 2.0 * self._parameters(model) * float(out.run[row].sum())
        return out

    def _parameters(self, model: LossModel) -> int:
        with self.file.told():
            found = self.file.connection.execute("select parameters from sizes where model = ?", [model.mark]).fetchone()
        if found is None:
            self._with_room(model).load()
            return model.parameters
        return found[0]

    def _of_model(self, model: LossModel, texts: list[str], hashes: list[bytes], tell: Tell) -> DocumentLosses:
        name = fingerprint([_VERSION, model.mark, self.config.window, self.config.stride, self.config.dtype])
        found = self._find(name, hashes)
        keys = list(dict.fromkeys(hashes))
        first = {key: place for place, key in reversed(list(enumerate(hashes)))}
        # Of like lengths together, so that little is padded; the longest first.
        left = sorted((first[key] for key in keys if key not in found), key=lambda place: -len(texts[place]))
        at = 0
        while at < len(left):
            begin, size = at, 0
            while at < len(left) and (at == begin or size < _KEPT_CHARACTERS):
                size += len(texts[left[at]])
                at += 1
            some = left[begin:at]
            scored = self._with_room(model).score([texts[place] for place in some])
            rows = [
                (name, hashes[place], nats if np.isfinite(nats) else None, *counts)
                for place, nats, *counts in zip(some, *(column.tolist() for column in scored), strict=True)
            ]
            with self.file.transaction() as connection:
                connection.executemany("insert or replace into losses values (?, ?, ?, ?, ?, ?)", rows)
                connection.execute("insert or replace into sizes values (?, ?)", (model.mark, model.parameters))
            found |= {key: values for _, key, *values in rows}
            self.counts["model tokens"] += int(scored.tokens.sum())
            self.counts["characters scored"] += int(scored.characters.sum())
            tell(model.key, len(found), len(keys))
        said = [
            nats is not None for nats, _, tokens, _ in found.values() if tokens > 0
        ]  # of those that have something to predict, cached ones among them
        if len(said) >= _FEW and not any(said):
            raise UserError(
                f'{model.key} = {model.path}: its loss is not a number on each of {len(said)} documents. Try losses.dtype = "float32", or look at its weights.'
            )
        return DocumentLosses(*(
            np.array([found[key][place] if found[key][place] is not None else np.nan for key in hashes], kind)
            for place, kind in enumerate(_KINDS)
        ))  # fmt: skip

    def _find(self, name: str, hashes: list[bytes]) -> dict[bytes, list[float]]:
        found: dict[bytes, list[float]] = {}
        with self.file.told():
            for begin in range(0, len(hashes), 500):
                some = hashes[begin : begin + 500]
                marks = ",".join("?" * len(some))
                query = f"select document, nats, characters, tokens, run from losses where model = ? and document in ({marks})"
                found |= {key: values for key, *values in self.file.connection.execute(query, [name, *some])}
        return found

    def _with_room(self, model: LossModel) -> LossModel:
        """The model, when those that are one too many have been freed."""
        if model not in self._held:
            self._held.append(model)
            while self.config.at_once is not None and len(self._held) > self.config.at_once:
                self._held.pop(0).close()
        return model

    def close(self) -> None:
        """Free the models and the file."""
        for model in self.models:
            model.close()
        self.file.close()


def same_tokenizer(store: LossStore) -> None:
    """See that all models of a store cut text alike.

    Raises:
        UserError: two do not, where a loss per token is compared.
    """
    first, *others = store.models
    for other in others:
        if other.vocabulary != first.vocabulary:
            raise UserError(f"{first.key} = {first.path} and {other.key} = {other.path} have different tokenizers, and their losses per token cannot be compared. "
                            "Take two models of one tokenizer; perplexity and predictive strength do without.")  # fmt: skip
