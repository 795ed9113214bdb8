"""The `data` commands."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from regrowth.data_pipeline.config import DataConfig, DataRecipe
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.pipeline import Pipeline, corpus_folder
from regrowth.data_pipeline.prepare import prepare as prepare_corpus
from regrowth.data_pipeline.rephrase.cache import tokens_in
from regrowth.data_pipeline.shards import Shard
from regrowth.data_pipeline.transform_config import Rephrase
from regrowth.settings import find_recipe, load

_TELL_SECONDS = 2.0  # between two looks at what has been answered, where there is a terminal


def prepare(config: str, overrides: list[str], dry_run: bool) -> None:
    """Build a corpus, with a progress bar for each stage."""
    settings, console = data_config(config, overrides), Console()
    if dry_run:
        return show_plan(settings, console)
    corpus = prepare_with_progress(settings, console)
    console.print(f"corpus {corpus.folder}", soft_wrap=True)
    print_corpus(corpus, console)


def show_plan(config: DataConfig, console: Console) -> None:
    """What would be done, without doing it: the folder, the items, the phases."""
    plan = Pipeline.plan_of(config)
    folder = plan.root
    state = "finished" if (folder / "corpus.json").exists() else "unfinished, would go on" if folder.exists() else "not begun"
    size = sum(item.size for _, item in plan.items) / 1e6
    console.print(f"{folder}: {state}; {len(plan.items)} items of {len(config.sources)} sources, {size:.1f} MB", soft_wrap=True)
    console.print(f"phases: {', '.join(phase.name for phase in plan.phases)}", soft_wrap=True)


def prepare_with_progress(config: DataConfig, console: Console, retry_failed: bool = False) -> Corpus:
    """Build or open the corpus of a config, showing progress."""
    # Progress is told in bytes of input where they are known, and in what comes near to bytes in the other phases.
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn(), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: float, total: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
                if not console.is_terminal:
                    console.print(f"{what} ...")
            progress.update(tasks[what], completed=done, total=total)

        def tell(text: str) -> None:
            if tasks and console.is_terminal:
                progress.update(list(tasks.values())[-1], description=f"{list(tasks)[-1]} [dim]({text})[/]")
            elif not console.is_terminal:
                console.print(text)

        with rephrasing_told(config, tell, _TELL_SECONDS if console.is_terminal else _TELL_SECONDS * 30):
            return prepare_corpus(config, report, retry_failed)


@contextmanager
def rephrasing_told(config: DataConfig, tell: Callable[[str], None], seconds: float) -> Iterator[None]:
    """While a recipe with rephrasing is worked on, tell every so often how much has been answered: one item of its input may take hours."""
    cache = next((t.cache for t in config.transforms if isinstance(t, Rephrase)), None)
    if cache is None:
        yield
        return
    ended, there = threading.Event(), tokens_in(cache)

    def watch() -> None:
        begin = time.monotonic()
        last = before = sum(there) if there else 0 if not cache.exists() else None
        while not ended.wait(seconds):
            if (seen := tokens_in(cache)) is None:
                continue  # somebody has held it for long
            now = sum(seen)
            before = now if before is None else before
            if now != last:
                tell(f"{now - before:,} tokens answered, {(now - before) / (time.monotonic() - begin):,.0f} a second")
            last = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def show(corpus: str, overrides: list[str]) -> None:
    """Tables of what a corpus holds and what was dropped."""
    print_corpus(open_corpus(corpus, overrides), Console())


def verify(corpus: str, overrides: list[str]) -> None:
    """Hash every shard of a corpus, or one shard."""
    if (path := Path(corpus)).suffix == ".arrow":
        shard = Shard(path)
        shard.verify()
        return Console().print(f"{path}: whole; {shard.index.documents:,} documents, {shard.index.tokens:,} tokens", soft_wrap=True)
    opened = open_corpus(corpus, overrides)
    Console().print(f"{opened.folder}: {opened.verify()} shards, all whole", soft_wrap=True)


def print_corpus(corpus: Corpus, console: Console) -> None:
    """Domains with their tokens, then the funnel with drop reasons."""
    table = Table("domain", "train tokens", "held-out tokens", "documents", "bytes/token", title="corpus")
    for domain in corpus.domains:
        rows = corpus.manifest["splits"]["train"][domain]
        documents, text = sum(r["documents"] for r in rows), sum(r["text_bytes"] for r in rows)
        tokens = corpus.tokens("train", domain)
        table.add_row(
            escape(domain), f"{tokens:,}", f"{corpus.tokens('heldout', domain):,}", f"{documents:,}", f"{text / max(tokens, 1):.2f}"
        )
    console.print(table)
    if silent := [domain for domain in corpus.domains if not corpus.tokens("heldout", domain)]:
        console.print(
            f"note: no held-out text in {escape(', '.join(silent))}, so no bits per byte there; raise data.heldout_fraction to have some.",
            soft_wrap=True,
        )
    funnel = Table("domain", "after", "documents", "MB", "dropped here, by reason", title="funnel")
    dropped: dict[tuple[str, str], list[str]] = {}
    kept: dict[tuple[str, str], tuple[int, int]] = {}
    for domain, transform, reason, documents, bytes_ in corpus.manifest["funnel"]:
        if reason:
            dropped.setdefault((domain, transform), []).append(f"{reason} {documents:,}")
        else:
            kept[domain, transform] = (documents, bytes_)
    order = ["source", *(t["kind"] for t in corpus.manifest["config"]["transforms"]), "split_train", "split_heldout"]
    for domain in sorted({d for d, _ in kept} | {d for d, _ in dropped}):
        for transform in order:
            if (domain, transform) in kept or (domain, transform) in dropped:
                documents, bytes_ = kept.get((domain, transform), (0, 0))
                funnel.add_row(
                    escape(domain),
                    escape(transform),
                    f"{documents:,}",
                    f"{bytes_ / 1e6:.2f}",
                    escape(", ".join(dropped.get((domain, transform), []))),
                )
    console.print(funnel)
    for transform, counts in corpus.manifest.get("counts", {}).items():
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        console.print(f"{transform} counted: {told}", soft_wrap=True, markup=False, highlight=False)
    for note in corpus.manifest.get("notes", []):
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    for letter in corpus.manifest.get("given_up", []):
        console.print(f"left out: {letter}", soft_wrap=True, markup=False, highlight=False)


def open_corpus(name: str, overrides: list[str]) -> Corpus:
    """A corpus by its folder, or by the recipe that made it."""
    folder = Path(name)
    if folder.is_dir():
        return Corpus.open(folder)
    return Corpus.open(corpus_folder(data_config(name, overrides)))


def data_config(config: str, overrides: list[str]) -> DataConfig:
    """The `[data]` section of a recipe, with overrides."""
    path = find_recipe(config)
    return load(DataRecipe, path, overrides).data
