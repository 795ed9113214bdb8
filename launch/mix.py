"""Look into a run's mixture: recompute its decisions, say what a step was made of, draw it over time."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regrowth.data_pipeline.mixing.explain import StepRead
from regrowth.errors import RunFailed
from regrowth.launch.training import corpora_of
from regrowth.pretrain.run_folder import RunFolder


def replay(path: Path) -> None:
    """The `mix replay` command.

    Raises:
        RunFailed: the recomputed decisions differ.
    """
    from regrowth.data_pipeline.mixing.replay import replay as go

    run = RunFolder.open(path)
    found = go(run.path)
    if found.first_difference:
        raise RunFailed(f"{run.path}: {found.steps} steps agree, then {found.first_difference}. Either the log was altered, or it was written on a "
                        "machine whose exp and log differ in the last bit.")  # fmt: skip
    told = f", and {found.followed} follow another run's log" if found.followed else ""
    Console().print(f"{run.path}: {found.steps} steps recomputed from their losses, all equal to the last bit{told}.", soft_wrap=True)


def plot(path: Path, out: Path | None) -> None:
    """The `mix plot` command."""
    from regrowth.pretrain.report.mixture import write_mixture

    run = RunFolder.open(path)
    Console().print(f"mixture: {write_mixture(run.path, out or run.path / 'mixture.html')}", soft_wrap=True)


def explain(path: Path, step: int, documents: int, domain: str | None, text: int) -> None:
    """The `mix explain` command."""
    from regrowth.data_pipeline.mixing.explain import explain as go

    run = RunFolder.open(path)
    show(go(run.path, corpora_of(run), step), documents, domain, text)


def show(read: StepRead, documents: int, domain: str | None, text: int) -> None:
    """Print a step: shares and losses by domain, the sources that gave most, and documents."""
    console, row = Console(), read.row
    counts = Counter(row["draws"])
    tokens: Counter[str] = Counter()
    for document in read.documents:
        tokens[document.domain] += document.end - document.begin
    table = Table("domain", "probability", "units drawn", "tokens", "documents", "loss", title=f"step {read.step}")
    for number, name in enumerate(read.domains):
        if counts[number] or row["probabilities"][number]:
            loss = (row["losses"] or {}).get(str(number))
            of_domain = {document.id for document in read.documents if document.domain == name}
            table.add_row(
                escape(name),
                f"{row['probabilities'][number]:.4f}",
                str(counts[number]),
                f"{tokens[name]:,}",
                str(len(of_domain)),
                f"{loss:.4f}" if loss is not None else "not finite" if counts[number] else "–",
            )
    console.print(table)
    sources = Table("source", "tokens", title="sources, largest first")
    for source, count in read.sources.most_common(10):
        sources.add_row(escape(source), f"{count:,}")
    console.print(sources)
    chosen = [d for d in read.documents if domain is None or d.domain == domain]
    listing = Table(
        "sequence",
        "domain",
        "document",
        "tokens",
        "shard",
        "source",
        "begins",
        title=f"{min(documents, len(chosen))} of {len(chosen)} documents",
    )
    for d in chosen[:documents]:
        begins = " ".join(d.text[:text].split())
        listing.add_row(str(d.place), escape(d.domain), d.id[:16], f"{d.begin}–{d.end}", escape(d.shard), escape(d.source), escape(begins))
    console.print(listing)
