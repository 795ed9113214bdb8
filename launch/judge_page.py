"""A comparison of selectors as a page: differences to the baseline with their intervals, drawn where the table only tells."""

import math
from html import escape
from typing import TYPE_CHECKING

from regrowth.launch.intervals import interval

if TYPE_CHECKING:
    from regrowth.launch.judge import Outcome

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}svg{width:100%;height:auto}
@media(prefers-color-scheme:dark){body{background:#161616;color:#eee}}"""
_DRAWING = """svg{color:#1b1b1b}text{font:12px system-ui,sans-serif;fill:currentColor}.zero{stroke:#888;stroke-dasharray:4 3}
.mine{stroke:#0072B2;fill:#0072B2}.counted{stroke:#D55E00;fill:#D55E00}@media(prefers-color-scheme:dark){svg{color:#eee}}"""
_WIDTH, _LEFT, _ROW = 760, 170, 34


def page(outcomes: "list[Outcome]", baseline: str, title: str) -> str:
    """The page: a plot of each measure that there is."""
    labels = {
        "bits_per_byte": "bits per byte of the target's held-out text, difference (left is better)",
        "accuracy": "mean accuracy on multiple choice, difference (right is better)",
    }
    plots = [
        f"<figure><figcaption>{escape(label)}</figcaption>{drawing}</figure>"
        for measure, label in labels.items()
        if (drawing := plot(outcomes, baseline, measure))
    ]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>Selectors beside {escape(baseline)}</h1><p>Each selector's subset of one pool trained the same model, for the same tokens and from the same seeds. Bars are 95% intervals over
paired seeds. <span style="color:#0072B2">Blue</span>: equal tokens. <span style="color:#D55E00">Orange</span>: the selection's own FLOPs taken from the training.</p>
{"".join(plots)}</body></html>
"""


def plot(outcomes: "list[Outcome]", baseline: str, measure: str) -> str:
    """An SVG of the paired differences in "bits_per_byte" or "accuracy", the best first; empty where nothing was measured."""
    from regrowth.launch.judge import paired

    base = next(outcome for outcome in outcomes if outcome.name == baseline)
    rows = []
    for outcome in outcomes:
        if outcome.name != baseline and (values := paired(outcome, base)[measure]):
            counted = paired(outcome, base, counted=True)[measure]
            rows.append((outcome.name, interval(values), interval(counted) if counted else None))
    if not rows:
        return ""
    rows.sort(key=lambda row: row[1][0], reverse=measure == "accuracy")
    ends = [0.0] + [
        mean + sign * (half if math.isfinite(half) else 0)
        for _, *both in rows
        for pair in both
        if pair
        for mean, half in [pair]
        for sign in (-1, 1)
    ]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return _LEFT + (value - low + 0.05 * span) / (1.1 * span) * (_WIDTH - _LEFT - 10)

    height = _ROW * len(rows) + 40
    parts = [f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - 30}"/>']
    for number, (name, mine, counted) in enumerate(rows):
        y = _ROW * number + 16
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for kind, pair, at in (("mine", mine, y), ("counted", counted, y + 9)):
            if pair:
                parts.append(_bar(kind, pair[0], pair[1], at, x))
    parts += [f'<text x="{x(value):.1f}" y="{height - 12}" text-anchor="middle">{value:+.4f}</text>' for value in (low, 0.0, high)]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"><style>{_DRAWING}</style>{"".join(parts)}</svg>'


def _bar(kind: str, mean: float, half: float, y: float, x) -> str:  # type: ignore[no-untyped-def]
    told = f"{mean:+.4f} ± {half:.4f}" if math.isfinite(half) else f"{mean:+.4f}"
    line = f'<line x1="{x(mean - half):.1f}" x2="{x(mean + half):.1f}" y1="{y}" y2="{y}" stroke-width="2"/>' if math.isfinite(half) else ""
    return f'<g class="{kind}"><title>{told}</title>{line}<circle cx="{x(mean):.1f}" cy="{y}" r="4"/></g>'
