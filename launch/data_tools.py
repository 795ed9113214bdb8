"""Looking into shards and corpora: inspect, stats, trace, merge, split, export."""

import json
from collections import Counter
from html import escape
from pathlib import Path

from rich import markup
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline import shard_tools
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.shards import Shard
from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.data_pipeline.trace import survivors, trace
from regrowth.errors import UserError
from regrowth.files import write_text

_BAR = 40


def inspect(path: Path, count: int, seed: int) -> None:
    """Statistics of a shard and a sample of its documents, decoded where its corpus's tokenizer is near."""
    shard, console = Shard(path), Console()
    index = shard.index
    table = Table(title=path.name, show_header=False)
    statistics = shard_tools.Statistics()
    statistics.add(shard)
    for name, value in (
        ("domain", index.domain),
        ("documents", f"{index.documents:,}"),
        ("tokens", f"{index.tokens:,}"),
        ("bytes of text per token", f"{index.text_bytes / max(index.tokens - index.documents, 1):.3f}"),
        ("blocks", f"{len(index.blocks):,}"),
        ("token type", "uint16" if index.token_bytes == 2 else "int32"),
        ("tokenizer", index.tokenizer_hash),
        ("sha256", index.sha256),
    ):
        table.add_row(name, markup.escape(value))
    console.print(table)
    _print_histogram(statistics, console)
    tokenizer = _tokenizer_of(path, index.tokenizer_hash)
    for row in shard_tools.sample(shard, count, seed):
        console.rule(row["id"])
        scores = {name: round(value, 4) for name, value in (row["scores"] or {}).items() if value is not None}
        console.print(" -> ".join(row["lineage"]) + (f"   {scores}" if scores else ""), soft_wrap=True, highlight=False, markup=False)
        shown = (
            tokenizer.decode(row["tokens"][1:])[:600] if tokenizer else f"tokens {row['tokens'][:40]} (no tokenizer.json of this hash near)"
        )
        console.print(shown, soft_wrap=True, highlight=False, markup=False)


def _tokenizer_of(path: Path, wanted: str) -> Tokenizer | None:
    for folder in path.resolve().parents:
        if (folder / "tokenizer" / "tokenizer.json").exists():
            tokenizer = Tokenizer.load(folder / "tokenizer")
            return tokenizer if tokenizer.hash == wanted else None
    return None


def _print_histogram(statistics: shard_tools.Statistics, console: Console) -> None:
    most = max(statistics.histogram.values(), default=1)
    table = Table("tokens", "documents", "", title="document lengths")
    for low in sorted(statistics.histogram):
        count = statistics.histogram[low]
        table.add_row(f"{low:,} to {2 * low - 1:,}", f"{count:,}", "█" * max(1, round(_BAR * count / most)))
    console.print(table)


def stats(corpus: Corpus, split: str, html: Path | None) -> None:
    """Tokens per domain and per source, and the lengths of documents, in the terminal and as a page."""
    if split not in ("train", "heldout"):
        raise UserError(f"--split {split}: choose train or heldout.")
    console = Console()
    statistics = shard_tools.corpus_statistics(corpus, split)
    for title, counts in _shares(statistics):
        table = Table("", "tokens", "share", "", title=title)
        for name, tokens in counts.most_common(20):
            share = tokens / max(statistics.tokens, 1)
            table.add_row(markup.escape(name), f"{tokens:,}", f"{share:.1%}", "█" * round(_BAR * share))
        if len(counts) > 20:
            table.add_row(f"and {len(counts) - 20:,} more", f"{sum(n for _, n in counts.most_common()[20:]):,}", "", "")
        console.print(table)
    _print_histogram(statistics, console)
    console.print(
        f"{statistics.documents:,} documents, {statistics.tokens:,} tokens, {statistics.text_bytes / 1e6:,.1f} MB, longest {statistics.longest:,}"
    )
    if html:
        write_text(html, _page(corpus, split, statistics))
        console.print(f"wrote {html}", soft_wrap=True)


def _shares(statistics: shard_tools.Statistics) -> list[tuple[str, Counter[str]]]:
    levels = Counter({f"L{level}": tokens for level, tokens in statistics.by_level.items()})
    return [("tokens by domain", statistics.by_domain), ("tokens by level", levels), ("tokens by source", statistics.by_source)]


def _page(corpus: Corpus, split: str, statistics: shard_tools.Statistics) -> str:
    def bars(title: str, rows: list[tuple[str, int]]) -> str:
        most = max((count for _, count in rows), default=1)
        lines = "".join(
            f'<tr><th>{escape(name)}</th><td class="n">{count:,}</td><td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td></tr>'
            for name, count in rows
        )
        return f"<h2>{escape(title)}</h2><table>{lines}</table>"

    lengths = [(f"{low:,} to {2 * low - 1:,}", statistics.histogram[low]) for low in sorted(statistics.histogram)]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(corpus.folder.name)}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}}
table{{border-collapse:collapse;width:100%}}th{{font-weight:400;text-align:left;overflow-wrap:anywhere}}.n{{text-align:right;padding:0 1rem}}
.bar{{width:45%}}.bar i{{display:block;height:.8rem;background:#0072B2}}
@media(prefers-color-scheme:dark){{body{{background:#161616;color:#eee}}.bar i{{background:#56B4E9}}}}</style></head><body>
<h1>{escape(corpus.folder.name)}: {escape(split)}</h1>
<p>{statistics.documents:,} documents, {statistics.tokens:,} tokens, {statistics.text_bytes / 1e6:,.1f} MB of text; the longest document has {statistics.longest:,} tokens.</p>
{"".join(bars(f"{title[0].upper()}{title[1:]}", counts.most_common(100)) for title, counts in _shares(statistics))}
{bars("Document lengths, in tokens", lengths)}</body></html>
"""


def trace_document(folder: Path, document: str | None, source: str | None, list_all: bool) -> None:
    """The way of one document, or what became of a source's documents."""
    console, pipeline = Console(highlight=False, markup=False, soft_wrap=True), Pipeline.open(folder)
    if (document is None) == (source is None):
        raise UserError("data trace: give a document's id, or --source with a file, a folder or file@offset.")
    if document is not None:
        found = trace(pipeline, document)
        for name in ("id", "source", "domain", "level", "scores", "meta"):
            console.print(f"{name:8} {getattr(found, name)}")
        for step in found.steps:
            console.print(f"  -> {step}")
        console.print(f"text     {found.text[:300]!r}")
        return
    assert source is not None
    survival = survivors(pipeline, source)
    if list_all:
        for survivor in survival.kept:
            print(json.dumps(survivor._asdict(), ensure_ascii=False))
        return
    console.print(f"{len(survival.kept):,} documents of {source} are in shards, {sum(survival.dropped.values()):,} were dropped")
    for reason, count in survival.dropped.most_common():
        console.print(f"  {count:>10,}  {reason}")
    for identity, place, shard in survival.kept[:10]:
        console.print(f"  {identity}  {place}  {shard}")
    if len(survival.kept) > 10:
        console.print("  ... (--all lists every one, as JSON lines)")


def merge(out: Path, shards: list[Path], block_tokens: int) -> None:
    """Several shards into one, in a new folder."""
    index = shard_tools.merge([Shard(path) for path in shards], out, block_tokens)
    Console().print(f"{out}/00000-000.arrow: {index.documents:,} documents, {index.tokens:,} tokens", soft_wrap=True)


def split(shard: Path, out: Path, parts: int, block_tokens: int) -> None:
    """One shard into several, in a new folder."""
    for name, index in shard_tools.split(Shard(shard), out, parts, block_tokens):
        Console().print(f"{out}/{name}: {index.documents:,} documents, {index.tokens:,} tokens", soft_wrap=True)


def export(corpus: Corpus, out: Path, to: str) -> None:
    """A corpus in another project's format."""
    if to != "megatron":
        raise UserError(f"--to {to}: the format is megatron.")
    for prefix, documents in shard_tools.export_megatron(corpus, out).items():
        Console().print(f"{out}/{prefix}.bin, .idx: {documents:,} documents", soft_wrap=True)
