"""From config to corpus on this machine: plan it, do its phases, open it. Every task that is done is passed over on a rerun."""

from pathlib import Path

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.executors.local import Progress, run_local
from regrowth.data_pipeline.phases.shard import ShardPhase
from regrowth.data_pipeline.pipeline import Pipeline, corpus_folder
from regrowth.files import exclusive, read_json


def prepare(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """Build the corpus of `config`, or open it if it is finished.

    Raises:
        UserError: a source is missing or empty, or every document was dropped (with the reasons counted).
        RunFailed: a worker process died, or the disk is full; run it again to go on.
    """
    folder = corpus_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".lock"):  # whoever comes second waits, and then finds it finished
        planned = Pipeline.create(config)
        reopen(planned)
        pipeline = Pipeline(planned.root, planned.plan)  # with nothing remembered of phases that were opened again
        if not pipeline.finished:
            run_local(pipeline, config.workers, progress or (lambda *_: None))
    return Corpus.open(pipeline.root)


def reopen(pipeline: Pipeline, retry_failed: bool = False) -> None:
    """Make unfinished again what has lost shards (removed because they were damaged) or, if asked, what was finished without some inputs."""
    again = _first_to_redo(pipeline, retry_failed)
    if again is None:
        return
    (pipeline.root / "corpus.json").unlink(missing_ok=True)
    for phase in pipeline.phases[again:]:
        keep_records = isinstance(phase, ShardPhase) and not retry_failed
        for path in phase.folder.glob("*") if phase.folder.exists() else ():
            lost = not keep_records or path.name == "complete.json" or _has_lost_shards(pipeline.root, path)
            if lost and (phase is not pipeline.phases[0] or path.name == "complete.json"):
                path.unlink()


def _first_to_redo(pipeline: Pipeline, retry_failed: bool) -> int | None:
    if retry_failed and pipeline.phases[0].settled and pipeline.phases[0].missing:
        return 0
    if pipeline.finished and Corpus.open(pipeline.root).missing():
        return next(n for n, phase in enumerate(pipeline.phases) if isinstance(phase, ShardPhase))
    return None


def _has_lost_shards(root: Path, record: Path) -> bool:
    if record.suffix != ".json":
        return False
    shards = [root / summary["path"] for _, _, summary in read_json(record)["shards"]]
    return any(not path.exists() or not path.with_suffix(".json").exists() for path in shards)
