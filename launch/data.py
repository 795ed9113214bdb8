"""The `data` commands."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.pipeline import corpus_folder, list_items
from regrowth.data_pipeline.prepare import prepare as prepare_corpus


def prepare(config: str, overrides: list[str], dry_run: bool) -> None:
    """Build a corpus, with a progress bar for each stage."""
    settings, console = _data_config(config, overrides), Console()
    if dry_run:
        items = list_items(settings)
        folder = corpus_folder(settings)
        state = "finished" if (folder / "corpus.json").exists() else "unfinished, would go on" if folder.exists() else "not begun"
        size = sum(item.size for _, item in items) / 1e6
        console.print(f"{folder}: {state}; {len(items)} items of {len(settings.sources)} sources, {size:.1f} MB", soft_wrap=True)
        return
    corpus = prepare_with_progress(settings, console)
    console.print(f"corpus {corpus.folder}", soft_wrap=True)
    print_corpus(corpus, console)


def prepare_with_progress(config: DataConfig, console: Console) -> Corpus:
    """Build or open the corpus of a config, showing progress."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: float, total: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
                if not console.is_terminal:
                    console.print(f"{what} ...")
            progress.update(tasks[what], completed=done, total=total)

        return prepare_corpus(config, report)


def show(corpus: str, overrides: list[str]) -> None:
    """Tables of what a corpus holds and what was dropped."""
    print_corpus(_open(corpus, overrides), Console())


def verify(corpus: str, overrides: list[str]) -> None:
    """Hash every shard."""
    opened = _open(corpus, overrides)
    Console().print(f"{opened.folder}: {opened.verify()} shards, all whole", soft_wrap=True)


def print_corpus(corpus: Corpus, console: Console) -> None:
    """Domains with their tokens, then the funnel with drop reasons."""
    table = Table("domain", "train tokens", "held-out tokens", "documents", "bytes/token", title="corpus")
    for domain in corpus.domains:
        rows = corpus.manifest["splits"]["train"][domain]
        documents, text = sum(r["documents"] for r in rows), sum(r["text_bytes"] for r in rows)
        tokens = corpus.tokens("train", domain)
        table.add_row(domain, f"{tokens:,}", f"{corpus.tokens('heldout', domain):,}", f"{documents:,}", f"{text / max(tokens, 1):.2f}")
    console.print(table)
    if silent := [domain for domain in corpus.domains if not corpus.tokens("heldout", domain)]:
        console.print(
            f"note: no held-out text in {', '.join(silent)}, so no bits per byte there; raise data.heldout_fraction to have some.",
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
                funnel.add_row(domain, transform, f"{documents:,}", f"{bytes_ / 1e6:.2f}", ", ".join(dropped.get((domain, transform), [])))
    console.print(funnel)


def _open(name: str, overrides: list[str]) -> Corpus:
    folder = Path(name)
    if folder.is_dir():
        return Corpus.open(folder)
    return Corpus.open(corpus_folder(_data_config(name, overrides)))


def _data_config(config: str, overrides: list[str]) -> DataConfig:
    from regrowth.pretrain.config import load_config

    return load_config(config, overrides).data
