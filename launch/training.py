"""Start, resume and report runs."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from regrowth.errors import RegrowthError, UserError
from regrowth.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from regrowth.data_pipeline.corpus import Corpus
    from regrowth.data_pipeline.tokenizer import Tokenizer
    from regrowth.pretrain.config import RunConfig
    from regrowth.pretrain.run_folder import RunFolder


def train(config: str | None, overrides: list[str], resume: Path | None, dry_run: bool, profile: bool = False) -> None:
    """The `train` command.

    Raises:
        UserError: both or neither of config and --resume were given, or anything they name is wrong.
    """
    from regrowth.pretrain.config import load_config
    from regrowth.pretrain.run_folder import RunFolder

    if profile:  # past the first steps, which are not like the others
        overrides = [*overrides, f"run.profile_from={_next_step(resume) + 3}"]
    if resume is not None:
        # With --resume the first argument, if any, is an override.
        overrides = ([config] if config else []) + overrides
        run = RunFolder.open(resume)
        settings = run.config(overrides)
    elif config is None:
        raise UserError("name a config (regrowth train CONFIG) or a run to go on with (regrowth train --resume RUN).")
    else:
        settings, run = load_config(config, overrides), None
    if dry_run:
        from regrowth.launch.show import show_dry_run

        show_dry_run(settings)
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "REGROWTH_LAUNCHER" not in os.environ:
        from regrowth.launch.one_rank import be_one_rank

        be_one_rank(settings, run)
        return
    if run:
        change_config(run, settings)
    run_training(settings, Console(), run)


def _next_step(run: Path | None) -> int:
    from regrowth.pretrain.run_folder import RunFolder

    return len(RunFolder.open(run).rows("metrics")) if run else 0


def run_training(config: "RunConfig", console: Console, run: "RunFolder | None" = None) -> "RunFolder":
    """Prepare the data, start the plan's ranks here, watch them to the end. Returns the run's folder."""
    from regrowth.launch.supervise import supervise
    from regrowth.pretrain.run_folder import RunFolder

    if run is None:
        RunFolder.check_place(config)
    place = corpus_of(run) if run else own_corpus(config, console)
    if run is None:
        run = RunFolder.create(config)
        write_json(run.path / "data.json", {"corpus": place})
    if run.finished:
        console.print(f"{run.path}: finished already.")
        return run
    console.print(f"[bold]run[/bold] {run.path}", soft_wrap=True)
    _note_spare_vocabulary(config, place, console)
    supervise(run, config, place, console)
    return run


def own_corpus(config: "RunConfig", console: Console) -> str:
    """The folder or address of the corpus that a new run reads: the one that is named, or the one of its [data], prepared if it is not yet.

    Raises:
        UserError: there is none there, or it cannot be prepared.
    """
    from regrowth.data_pipeline.corpora import open_corpora
    from regrowth.data_pipeline.sources.paths import is_remote
    from regrowth.launch.data import prepare_with_progress

    if place := config.loader.corpus:
        open_corpora(place, config.loader)
        return place if is_remote(place) else str(Path(place).resolve())
    assert config.data is not None
    return str(prepare_with_progress(config.data, console).folder.resolve())


def _note_spare_vocabulary(config: "RunConfig", place: str, console: Console) -> None:
    from regrowth.data_pipeline.corpora import open_corpora

    own = open_corpora(place, config.loader.model_copy(update={"corpora": []}))  # those that join have its tokenizer
    tokenizer = own.manifest["tokenizer"]["vocabulary"]
    if config.model.vocabulary > tokenizer:
        console.print(
            f"note: model.vocabulary = {config.model.vocabulary}, the tokenizer has {tokenizer} ids: the other rows are never trained and never "
            f"sampled. Set model.vocabulary={tokenizer} to leave them out.",
            soft_wrap=True,
            highlight=False,
        )


def corpus_of(run: "RunFolder") -> str:
    """The folder or address of the corpus that a run reads.

    Raises:
        UserError: it is not where it was.
    """
    from regrowth.data_pipeline.sources.paths import is_remote

    if not (run.path / "data.json").exists():
        raise UserError(
            f"{run.path}: this run was cut off before it began (it has no data.json). Remove it, and start it anew: regrowth train CONFIG"
        )
    place = str(read_json(run.path / "data.json")["corpus"])
    if not is_remote(place) and not (Path(place) / "corpus.json").exists():
        again = "" if run.config().loader.corpus else f"Prepare it again (regrowth data prepare {run.path}/config.toml) or "
        raise UserError(f"{run.path}: its corpus {place} is gone. {again}{'p' if again else 'P'}ut it back.")
    return place


def corpora_of(run: "RunFolder") -> "Corpus":
    """All that a run reads, as one corpus."""
    from regrowth.data_pipeline.corpora import open_corpora

    return open_corpora(corpus_of(run), run.config().loader)


def tokenizer_of(run: "RunFolder") -> "Tokenizer":
    """The tokenizer of a run, for which only its own corpus is opened."""
    from regrowth.data_pipeline.corpora import open_corpora

    return open_corpora(corpus_of(run), run.config().loader.model_copy(update={"corpora": []})).tokenizer


def change_config(run: "RunFolder", config: "RunConfig") -> None:
    """Write changed settings into the run, with the change logged.

    Raises:
        UserError: they cannot change any more.
    """
    from regrowth.settings import differences, to_toml

    before = run.config()
    if before == config:
        return
    fixed = [name for name in ("model", "data") if getattr(before, name) != getattr(config, name)]
    # What a sequence is and in which order they come is settled; which domains they come from, and how many a step takes, is not.
    order = ("corpus", "sequence_length", "unit_sequences", "packing", "seed")
    fixed += [f"loader.{key}" for key in order if getattr(before.loader, key) != getattr(config.loader, key)]
    if fixed:
        raise UserError(f"{run.path}: {' and '.join(fixed)} cannot change once a run has begun; start a new run for that.")
    if config.loader.corpora != before.loader.corpora or config.mixing != before.mixing:
        _check_mixture(run, config)
    write_text(run.path / "config.toml", to_toml(config))
    changed = differences(before.model_dump(mode="json"), config.model_dump(mode="json"))
    told = "; ".join(f"{key}: {json.dumps(old)} -> {json.dumps(new)}" for key, old, new in changed)
    run.log("events", {"event": "config changed", "time": time.time(), "changes": told})


def _check_mixture(run: "RunFolder", config: "RunConfig") -> None:
    """Refuse a mixture that does not fit the corpora before anything is written."""
    from regrowth.data_pipeline.corpora import open_corpora
    from regrowth.data_pipeline.loader import Loader

    Loader(open_corpora(corpus_of(run), config.loader), config.loader, config.mixing, config.run.steps)


def report(folder: Path) -> None:
    """The `report` command."""
    from regrowth.pretrain.run_folder import RunFolder

    Console().print(f"report: {make_report(RunFolder.open(folder))}", soft_wrap=True)


def make_report(run: "RunFolder") -> Path:
    """Write a run's report, with the byte trigram measured if it is not yet."""
    from regrowth.parallel.cluster import clusters, load_cluster
    from regrowth.parallel.planner import predict
    from regrowth.pretrain.checkpoint import read_state
    from regrowth.pretrain.checkpoint_folders import list_checkpoints
    from regrowth.pretrain.report.build import write_baseline, write_report

    try:
        corpus = corpora_of(run)
    except RegrowthError:  # gone, or out of reach: the report is of what the run wrote
        corpus = None
    if corpus and not corpus.remote and not (run.path / "baseline.json").exists():  # it reads all of the text
        write_baseline(run, corpus)
    config = run.config()
    checkpoints = list_checkpoints(run.path)
    model = read_state(checkpoints[-1]).model if checkpoints else config.model
    cluster = load_cluster(clusters()["laptop" if config.run.dtype == "float32" else "h100_node"])
    prediction = predict(
        model, run.plan(config), cluster, config.loader.global_batch, config.loader.sequence_length, recipe=config.precision.build()
    )
    return write_report(run, corpus, prediction)
