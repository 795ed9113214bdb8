"""`data rephrase`: look at what a recipe's rephrasing writes, what it would cost, and what has come of it."""

import itertools
from collections.abc import Iterable
from html import escape
from pathlib import Path

from rich import box, markup
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.phases.shard import TokenizerPhase
from regrowth.data_pipeline.pipeline import Pipeline, corpus_folder
from regrowth.data_pipeline.rephrase.collapse import MOST_DOCUMENTS, SUSPICIOUS, Collapse, collapse, rephrased
from regrowth.data_pipeline.rephrase.trial import Shown, estimate, preview, rephrase_config
from regrowth.errors import UserError
from regrowth.files import write_text
from regrowth.launch.data import data_config


def run(
    recipe: str, overrides: list[str], count: int | None, html: Path | None, documents: int | None, report: bool, budget: int | None
) -> None:
    """One of the three.

    Raises:
        UserError: none of them or several were asked for.
    """
    if sum((count is not None, documents is not None, report)) != 1:
        raise UserError("data rephrase: say what to show, one of --preview N, --estimate N and --report.")
    console = Console()
    if report:
        return show_report(recipe, overrides, console, html)
    config = with_budget(data_config(recipe, overrides), budget)
    if count is not None:
        return show_preview(config, count, console, html)
    assert documents is not None
    show_estimate(config, documents, console)


def with_budget(config: DataConfig, tokens: int | None) -> DataConfig:
    """A recipe with a budget of its own for this time."""
    if tokens is None:
        return config
    rephrase_config(config)  # a budget for nothing is a mistake
    transforms = [t.model_copy(update={"budget_tokens": tokens}) if t.kind == "rephrase" else t for t in config.transforms]
    return config.model_copy(update={"transforms": transforms})


def show_preview(config: DataConfig, count: int, console: Console, html: Path | None) -> None:
    """Source and rephrase side by side, as they come."""
    shown = []
    with console.status("asking ..."):
        for one in preview(config, count):
            shown.append(one)
            table = Table(
                "source", _verdict(one), title=markup.escape(f"{one.style}   {one.source_name}"), expand=True, box=box.SIMPLE_HEAD
            )
            for column in table.columns:
                column.ratio, column.overflow = 1, "fold"
            table.add_row(markup.escape(one.source), markup.escape(one.text))
            console.print(table)
    if not shown:
        raise UserError(
            "data rephrase: no document would be rephrased; check data.sources, and the domains, rules and score names of the transform."
        )
    good, tokens = sum(not one.reason for one in shown), sum(one.prompt_tokens + one.completion_tokens for one in shown)
    console.print(f"{good} of {len(shown)} chunks would be kept; {tokens:,} tokens, which the cache now has", highlight=False)
    if html:
        write_text(html, _page(config, shown))
        console.print(f"wrote {html}", soft_wrap=True)


def _verdict(one: Shown) -> str:
    return f"[red]dropped: {markup.escape(one.reason)}[/]" if one.reason else "[green]kept[/]"


def _page(config: DataConfig, shown: Iterable[Shown]) -> str:
    rows = "".join(
        f'<section class="{"dropped" if one.reason else "kept"}"><h2>{escape(one.style)} <small>{escape(one.source_name)} &middot; '
        f"{'dropped: ' + escape(one.reason) if one.reason else 'kept'} &middot; {one.prompt_tokens:,} + {one.completion_tokens:,} tokens</small></h2>"
        f"<div><p>{escape(one.source)}</p><p>{escape(one.text)}</p></div></section>"
        for one in shown
    )
    return _document(f"Rephrased by {rephrase_config(config).engine.model}", rows)


def _document(title: str, body: str) -> str:
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}}
section{{border-top:3px solid #0072B2;margin:1.5rem 0}}section.dropped{{border-color:#D55E00}}h2{{font-size:1rem}}small{{font-weight:400;opacity:.75}}
div{{display:grid;grid-template-columns:1fr 1fr;gap:2rem}}p{{white-space:pre-wrap;overflow-wrap:anywhere;margin:0}}
td{{padding-right:1rem}}td i{{display:inline-block;height:.7rem;background:#0072B2;margin-right:.5rem}}
@media(max-width:50rem){{div{{grid-template-columns:1fr}}}}
@media(prefers-color-scheme:dark){{body{{background:#161616;color:#eee}}td i{{background:#56B4E9}}}}</style></head><body>
<h1>{escape(title)}</h1>{body}</body></html>
"""


def show_estimate(config: DataConfig, documents: int, console: Console) -> None:
    """Requests, tokens and money."""
    with console.status("counting ...") as status:
        found = estimate(config, documents, lambda done: status.update(f"counting ... {done:,} documents"))
    if not found.rephrased:
        raise UserError(
            f"data rephrase: none of {found.documents:,} documents would be rephrased; check the domains, rules and score names of the transform."
        )
    scale = found.scale
    table = Table("style", "requests", title=f"{'about ' if scale > 1 else ''}{found.rephrased * scale:,.0f} documents to rephrase")
    for style, requests in sorted(found.requests.items()):
        table.add_row(style, f"{requests * scale:,.0f}")
    console.print(table)
    told = [f"prompts {found.prompt_tokens * scale:,.0f} tokens; answers {found.source_tokens * scale:,.0f} if they are as long as their sources, "
            f"{found.most_completion_tokens * scale:,.0f} at most"]  # fmt: skip
    if price := rephrase_config(config).engine.price:
        usual, most = found.cost(price)
        told.append(f"cost {usual:,.2f}, {most:,.2f} at most")
    how = (
        "all of the input was read"
        if scale == 1
        else f"{found.documents:,} documents were read, {found.sampled_bytes / found.total_bytes:.1%} of the input's bytes"
    )
    console.print("; ".join(told), f"({how}; before deduplication)", highlight=False, soft_wrap=True)


def show_report(target: str, overrides: list[str], console: Console, html: Path | None) -> None:
    """What was kept and dropped, what it cost, and whether a style has become a template."""
    folder = Path(target) if Path(target).is_dir() else corpus_folder(data_config(target, overrides))
    pipeline = Pipeline.open(folder)
    transform = rephrase_config(pipeline.config)
    curated = itertools.takewhile(lambda phase: not isinstance(phase, TokenizerPhase), pipeline.phases)
    if missing := next((phase for phase in curated if not phase.settled), None):
        raise UserError(
            f"{folder}: {missing.name} is not finished; `regrowth data run` goes on with it, `regrowth data status {folder}` tells how far it is."
        )
    counts = pipeline.counts().get("rephrase", {})
    prompt, completion = counts.get("prompt tokens", 0), counts.get("completion tokens", 0)
    cost = f", cost {transform.engine.price.of(prompt, completion):,.2f}" if transform.engine.price else ""
    console.print(f"{prompt:,} tokens of prompts, {completion:,} of answers{cost}", highlight=False)
    verdicts = Table("style", "chunks", "kept", "dropped, by reason", title="answers")
    for style, reasons in sorted(_by_style(counts).items()):
        total = sum(reasons.values())
        dropped = ", ".join(
            f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]) if reason != "good"
        )
        verdicts.add_row(style, f"{total:,}", f"{reasons.get('good', 0) / total:.1%}", dropped)
    console.print(verdicts)
    with console.status("reading rephrases ..."):
        parts = pipeline.parts
        found = collapse(rephrased(batch for part in parts.present() for batch in parts.kept(part)))
    for one in found:
        console.print(_collapse_table(one))
    if suspicious := [one.style for one in found if one.is_suspicious]:
        console.print(f"[yellow]{', '.join(suspicious)}: an opening or a run of words is in more than {SUSPICIOUS:.0%} of the documents. Look at them (--preview); "
                      "vary the prompt, raise its temperature, or give the style fewer documents.[/]", soft_wrap=True)  # fmt: skip
    if html:
        write_text(html, _document(f"Rephrases of {folder.name}", "".join(map(_collapse_html, found))))
        console.print(f"wrote {html}", soft_wrap=True)


def _by_style(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, count in counts.items():
        style, colon, reason = name.partition(": ")
        if colon:
            found.setdefault(style, {})[reason] = count
    return found


def _collapse_table(one: Collapse) -> Table:
    looked = f", {one.looked_at:,} of them looked at" if one.documents > MOST_DOCUMENTS else ""
    table = Table("commonest openings", "share", "commonest runs of five words", "share",
                  title=f"{one.style}: {one.documents:,} documents{looked}; {one.distinct_openings:.0%} distinct openings")  # fmt: skip
    for number in range(max(len(one.openings), len(one.runs))):
        cells = [
            (markup.escape(its[number][0]), f"{its[number][1]:.1%}") if number < len(its) else ("", "") for its in (one.openings, one.runs)
        ]
        table.add_row(*cells[0], *cells[1])
    return table


def _collapse_html(one: Collapse) -> str:
    def bars(title: str, rows: list[tuple[str, float]]) -> str:
        lines = "".join(
            f'<tr><td>{escape(words)}</td><td><i style="width:{10 * share:.2f}rem"></i>{share:.1%}</td></tr>' for words, share in rows
        )
        return f"<table><caption>{title}</caption>{lines}</table>"

    told = f"{one.documents:,} documents, {one.looked_at:,} looked at; {one.distinct_openings:.0%} distinct openings"
    tables = bars("commonest openings", one.openings) + bars("commonest runs of five words", one.runs)
    return f'<section class="{"dropped" if one.is_suspicious else "kept"}"><h2>{escape(one.style)} <small>{told}</small></h2><div>{tables}</div></section>'
