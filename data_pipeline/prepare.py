"""From config to corpus on this machine: plan it, do its phases, open it. Every task that is done is passed over on a rerun."""

import shutil
from pathlib import Path

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import SPLITS, Corpus
from regrowth.data_pipeline.executors.local import Progress, run_local
from regrowth.data_pipeline.phases.shard import ShardPhase
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.files import exclusive, read_json, write_json

_REOPENING = ".reopening.json"


def prepare(config: DataConfig, progress: Progress | None = None, retry_failed: bool = False) -> Corpus:
    """Build the corpus of `config`, or open it if it is finished. `retry_failed` tries inputs again that were given up.

    Raises:
        UserError: a source is missing or empty, or every document was dropped (with the reasons counted).
        RunFailed: a worker process died, or the disk is full; run it again to go on.
    """
    plan = Pipeline.plan_of(config)
    plan.root.mkdir(parents=True, exist_ok=True)
    with exclusive(plan.root / ".lock"):  # whoever comes second waits, and then finds it finished
        pipeline = reopened(plan.begin(), retry_failed)
        if not pipeline.finished:
            run_local(pipeline, config.workers, progress or (lambda *_: None))
    return Corpus.open(pipeline.root)


def reopened(pipeline: Pipeline, retry_failed: bool = False) -> Pipeline:
    """The pipeline with what has to be done again made unfinished.

    That is: the shards that were removed because they were damaged and, if asked, everything behind inputs that were given up.
    """
    mark = pipeline.root / _REOPENING
    again = _first_to_redo(pipeline, retry_failed)
    if again is not None and not mark.exists():
        write_json(mark, {"phase": again, "keep_shards": not retry_failed})
    if mark.exists():  # ours, or of a process that was killed in the middle of this
        _reopen(pipeline, **read_json(mark))
        mark.unlink()
    return Pipeline(pipeline.root, pipeline.plan)  # with nothing remembered of phases that were opened again


def _reopen(pipeline: Pipeline, phase: int, keep_shards: bool) -> None:
    root = pipeline.root
    (root / "corpus.json").unlink(missing_ok=True)
    for redone in reversed(pipeline.phases[phase:]):
        (redone.folder / "complete.json").unlink(missing_ok=True)
        if redone is pipeline.phases[0]:
            continue  # its gate alone: the tasks that are done stay done
        for path in redone.folder.glob("*"):
            if not (isinstance(redone, ShardPhase) and keep_shards and _has_its_shards(root, path)):
                path.unlink()
        if not keep_shards:
            for path in (root / "dropped").glob(f"{redone.name}-*.arrow"):
                path.unlink()
    if not keep_shards:
        for split in SPLITS:
            shutil.rmtree(root / split, ignore_errors=True)


def _first_to_redo(pipeline: Pipeline, retry_failed: bool) -> int | None:
    if retry_failed and pipeline.phases[0].settled and pipeline.phases[0].missing:
        return 0
    if pipeline.finished and Corpus.open(pipeline.root).missing():
        return next(n for n, phase in enumerate(pipeline.phases) if isinstance(phase, ShardPhase))
    return None


def _has_its_shards(root: Path, record: Path) -> bool:
    if record.suffix != ".json":
        return True
    shards = [root / summary["path"] for _, _, summary in read_json(record)["shards"]]
    return all(path.exists() and path.with_suffix(".json").exists() for path in shards)
