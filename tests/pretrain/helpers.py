"""Runs for tests: create, run on a pool of ranks, read back."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.corpus import Corpus
from regrowth.files import write_json
from regrowth.parallel.ranks import RankPool
from regrowth.pretrain.checkpoint_folders import list_checkpoints, step_of
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.train import Trainer, train
from tests.conftest import small_run_values

Ranks = Callable[[int], RankPool]


def new_run(corpus: Corpus, runs: Path, **sections: Any) -> RunFolder:
    """A run's folder over the small corpus."""
    values = small_run_values(Path("unused"), corpus.folder.parent, runs, **sections)
    values["data"] = corpus.manifest["config"]
    run = RunFolder.create(RunConfig.model_validate(values))
    write_json(run.path / "data.json", {"corpus": str(corpus.folder)})
    return run


def go(run: RunFolder, corpus: Corpus, ranks: Ranks) -> RunFolder:
    """Run to the end on as many ranks as the plan wants."""
    ranks(run.plan().world_size).run(train, run.path, corpus.folder)
    return run


def losses(run: RunFolder) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in run.rows("metrics")]


@contextmanager
def before_step(do: Callable[[Trainer, int], None]) -> Iterator[None]:
    """While it is open, `do` is called with the trainer and the step's number before each step of this process."""
    step = Trainer.train_step

    def with_it(self: Trainer, number: int) -> None:
        do(self, number)
        step(self, number)

    Trainer.train_step = with_it  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train_step = step  # type: ignore[method-assign]


def cut_back(run: RunFolder, step: int) -> None:
    """Make a run look as if it had been killed after the checkpoint of `step`."""
    for path in list_checkpoints(run.path):
        if step_of(path) > step:
            shutil.rmtree(path)
    events = [e for e in run.rows("events") if e["event"] != "finished"]
    (run.path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
