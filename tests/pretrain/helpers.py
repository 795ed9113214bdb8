"""Runs for tests: create, run on a pool of ranks, read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.corpus import Corpus
from regrowth.files import write_json
from regrowth.parallel.ranks import RankPool
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.train import train
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
