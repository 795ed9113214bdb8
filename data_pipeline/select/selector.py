"""A selector: fitted once to a pool (and perhaps to a target's text), it gives every document a number; the greatest are to be kept.

What is drawn by chance is a score as well: a document with the weight w that is kept if u < f w, with u from its content, has the score w / u, and keeping the greatest until
enough is kept is the f that keeps so much. So every selector goes with `keep_best`, and rates need no calibration of their own.

    SELECTOR/selector.json   what it is: its config, what it was fitted to, what was found out, what it cost
    SELECTOR/...             its model's files, whose hashes stand in selector.json
"""

import time
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.phases.keep_best import tie_of
from regrowth.data_pipeline.select.config import SelectorConfig, SelectorSettings, essence, plain
from regrowth.data_pipeline.select.loss_store import Tell
from regrowth.data_pipeline.select.pool import Pool
from regrowth.data_pipeline.select.record import FORMAT, RECORD, model_mark, read_record
from regrowth.data_pipeline.transforms.hashing import content_hashes
from regrowth.errors import UserError
from regrowth.files import fingerprint, sha256_of, write_json
from regrowth.settings import validate


class Selector(ABC):
    """Base of the selectors.

    Args:
        folder: of its files.
    """

    version = 1  # changes when the same config comes to give other scores

    def __init__(self, config: Any, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def fit(self, pool: Pool, target: Pool | None, tell: Tell) -> dict[str, Any]:
        """Learn what is to be learnt, and write it into the folder; returns what people should know of it.

        Raises:
            UserError: it cannot be learnt from this.
        """

    @abstractmethod
    def score(self, batch: pa.RecordBatch) -> np.ndarray:
        """float [n]: of each document, the greater the better; NaN of those that it can say nothing of."""

    def warm(self) -> None:  # noqa: B027 - models that may not be needed, because all is cached, are loaded late
        """Load what scoring needs in any case, so that what is wrong with it is found at once."""

    @property
    def flops(self) -> float:
        """Floating-point operations that this object has spent, as near as can be told."""
        return 0.0

    def describe(self) -> dict[str, Any]:
        """The record of its fit."""
        return read_record(self.folder)

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Free what it holds."""


def fit_selector(config: SelectorSettings, folder: Path, pool: Pool, target: Pool | None, tell: Tell = lambda *_: None) -> Selector:
    """A fitted selector in a folder: the one that stands there if it is of the same config and documents, else a new one.

    Raises:
        UserError: the folder holds another selector, or nothing can be learnt from these documents.
    """
    from regrowth.data_pipeline.select.registry import build_selector, inputs_of

    selector = build_selector(config, folder)

    def of_itself(settings: dict[str, Any]) -> dict[str, Any]:
        """What is not a file or a model: those are known by what is in them (`inputs`), not by where they lie."""
        return {key: value for key, value in settings.items() if key not in (*config.inputs, *config.models, "models_file", "like")}

    wanted = {
        "format": FORMAT,
        "config": of_itself(essence(config)),
        "version": selector.version,
        "pool": pool.mark,
        "target": target.mark if target and config.needs_target else None,
        "inputs": inputs_of(config),
    }
    if (folder / RECORD).exists():
        there = read_record(folder)
        there["config"] = of_itself(there["config"])  # earlier versions wrote all
        if changed := [key for key, value in wanted.items() if there.get(key) != value]:
            raise UserError(
                f"{folder}: holds a selector that was fitted to something else ({', '.join(changed)}). Remove it, or name another folder."
            )
        if there["settings"] != plain(config):  # a model that lies elsewhere now is found there from now on
            write_json(folder / RECORD, {**there, "settings": plain(config)})
        return selector
    if config.needs_target and target is None:
        raise UserError(f"selectors: {plain(config)['kind']} is fitted to the target's text; give the recipe a [target] with sources.")
    folder.mkdir(parents=True, exist_ok=True)
    begin, spent = time.monotonic(), time.process_time()
    findings = selector.fit(pool, target, tell)
    cost = {"seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - spent, "flops": selector.flops}
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    record = {**wanted, "settings": plain(config), "files": files, "mark": fingerprint([wanted, files]), "findings": findings, "cost": cost}
    write_json(folder / RECORD, record)
    return selector


def load_selector(folder: Path, key: str) -> Selector:
    """A fitted selector.

    Raises:
        UserError: there is none, it is of another version, or a file of it has changed.
    """
    from regrowth.data_pipeline.select.registry import build_selector

    record = read_record(folder, key)
    config = validate(_Recorded, {"selector": record["settings"]}, str(folder / RECORD)).selector
    selector = build_selector(config, folder)
    if record["format"] != FORMAT or record["version"] != selector.version:
        raise UserError(f"{folder}: fitted by another version of this selector; fit it again in a new folder.")
    for model in type(config).models:
        if model_mark(getattr(config, model)) != record["inputs"][model]:
            raise UserError(
                f"{folder}: the model {model} = {getattr(config, model)} is gone or has changed since the selector was fitted; put it back, or fit in a new folder."
            )
    for name, wanted in record["files"].items():
        path = folder / name
        if not path.exists() or sha256_of(path) != wanted:
            raise UserError(
                f"{path}: {'has changed' if path.exists() else 'is missing'} since the selector was fitted; fit it again in a new folder."
            )
    return selector


def chances(batch: pa.RecordBatch, seed: int) -> np.ndarray:
    """float64 [n], in (0, 1): a uniform number from each document's content and a seed."""
    tie = tie_of(content_hashes(batch.column("text")).view("<u8").reshape(-1, 2)[:, 0], seed)
    return ((tie >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


class _Recorded(SelectorSettings):
    selector: SelectorConfig
