"""A checkpoint's lineage as a picture: from its first ancestor down, what was done with each, and where the FLOPs went."""

from html import escape
from itertools import pairwise

from regrowth.pretrain.lineage import Lineage, Parent

WIDTH, ROW, BOX, GAP = 520, 74, 40, 12
_COLOURS = {"grown from": "#009E73", "continued from": "#0072B2", "averaged from": "#CC79A7"}


def lineage_svg(lineage: Lineage) -> str:
    """Inline SVG; empty where there are no ancestors. Checkpoints that were averaged stand side by side."""
    if not lineage.parents:
        return ""
    rows = _rows(lineage)
    total = max(lineage.train_flops, 1.0)
    parts, before = [], 0.0
    for number, row in enumerate(rows):
        top, width = number * ROW, (WIDTH - GAP * (len(row) - 1)) / len(row)
        spent = max(parent.train_flops for parent in row)
        for place, parent in enumerate(row):
            parts.append(_box(parent, place * (width + GAP), top, width, (spent - before) / total, spent - before, number == len(rows) - 1))
        before = max(before, spent)
    for number, (row, _) in enumerate(pairwise(rows)):
        top, width = number * ROW + BOX, (WIDTH - GAP * (len(row) - 1)) / len(row)
        colour, label = _COLOURS.get(row[0].relation, "#5B5B5B"), row[0].operator.get("op", "")
        for place in range(len(row)):
            x = place * (width + GAP) + width / 2
            parts.append(
                f'<line x1="{x:.0f}" y1="{top}" x2="{WIDTH / 2:.0f}" y2="{top + ROW - BOX - 4}" stroke="{colour}" stroke-width="2" marker-end="url(#tip)"/>'
            )
        parts.append(
            f'<text x="{WIDTH / 2 + 12:.0f}" y="{top + 21}" font-size="12" fill="{colour}">{escape(("grown by " if row[0].relation == "grown from" else "") + label)}</text>'
        )
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto"><path d="M0,0L8,4L0,8z" fill="#5B5B5B"/></marker>'
    height = len(rows) * ROW - (ROW - BOX) + 2
    return (
        f'<svg class="lineage" viewBox="0 0 {WIDTH} {height}" width="100%" role="img" aria-label="lineage"><defs>{tip}</defs>'
        f"{''.join(parts)}</svg>"
    )


def _rows(lineage: Lineage) -> list[list[Parent]]:
    """Ancestors that were averaged together share a row; every other has its own, and this checkpoint the last."""
    rows: list[list[Parent]] = []
    for parent in lineage.parents:
        if rows and parent.relation == rows[-1][0].relation == "averaged from":
            rows[-1].append(parent)
        else:
            rows.append([parent])
    return [*rows, [lineage.as_parent("", "", {})]]


def _box(parent: Parent, x: float, y: float, width: float, share: float, flops: float, last: bool) -> str:
    sizes = f" · {parent.operator['parameters'][0]:,} parameters" if "parameters" in parent.operator else ""
    narrow = width < WIDTH / 2
    name = "this checkpoint" if last else parent.id[: 7 if narrow else 12]
    line = f"{name} · step {parent.step:,}{sizes}"
    told = f"{parent.train_flops:.2g} FLOPs" if narrow else f"{parent.train_flops:.3g} FLOPs by then"
    if flops > 0 and not narrow:
        told = f"{flops:.3g} FLOPs here, {share:.0%} of all"
    return (
        f'<g><rect x="{x:.0f}" y="{y + 1}" width="{width:.0f}" height="{BOX}" rx="5" fill="none" stroke="#8a8a8a"/>'
        f'<rect x="{x + 1:.0f}" y="{y + BOX - 5}" width="{max(0.0, min(1.0, share)) * (width - 2):.1f}" height="5" fill="#E69F00"/>'
        f'<text x="{x + 9:.0f}" y="{y + 16}" font-size="12" fill="currentColor">{escape(line)}</text>'
        f'<text x="{x + 9:.0f}" y="{y + 31}" font-size="11" fill="#767676">{escape(told)}</text></g>'
    )
