"""Charts as inline SVG: lines or stacked areas over steps, with event markers and a crosshair that reads out values.

Drawn here instead of with a plotting library so that the report stays one small file that opens anywhere, offline.
"""

import json
import math
from dataclasses import dataclass, field
from html import escape

# Okabe-Ito: told apart by people who see colours differently.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#5B5B5B")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 260, 58, 14, 14, 34

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """What to draw. `events` are (step, label) markers."""

    title: str
    y_label: str
    series: dict[str, Points]
    events: list[tuple[float, str]] = field(default_factory=list)
    stacked: bool = False
    dots: bool = False  # few points: show where they are
    from_zero: bool = False
    note: str = ""

    def svg(self) -> str:
        """The chart as an HTML figure; a sentence in its place when there is nothing to draw."""
        series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in self.series.items()}
        series = {name: points for name, points in series.items() if points}
        if not series:
            return f'<figure class="chart"><figcaption>{escape(self.title)}</figcaption><p class="none">Nothing recorded yet.</p></figure>'
        drawn = _stack(series) if self.stacked else {name: [(x, 0.0, y) for x, y in points] for name, points in series.items()}
        xs = [x for points in series.values() for x, _ in points] + [x for x, _ in self.events]
        tops = [top for points in drawn.values() for _, _, top in points]
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
        y_low, y_high = (0.0, max(tops)) if self.stacked or self.from_zero else (min(tops), max(tops))
        ticks = nice_ticks(y_low, y_high if y_high > y_low else y_low + 1)
        if self.stacked:  # shares end at one, not at the next round number
            ticks = [tick for tick in ticks if tick <= y_high + 1e-9]
        y_low, y_high = min(y_low, ticks[0]), max(y_high, ticks[-1])

        def at(x: float, y: float) -> str:
            px = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
            py = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
            return f"{px:.1f},{py:.1f}"

        parts = [_axes(at, ticks, nice_ticks(x_low, x_high, 7), x_low, x_high, y_low, self.y_label)]
        for number, (name, points) in enumerate(drawn.items()):
            colour = COLOURS[number % len(COLOURS)]
            if self.stacked:
                outline = [at(x, top) for x, _, top in points] + [at(x, base) for x, base, _ in reversed(points)]
                parts.append(
                    f'<polygon points="{" ".join(outline)}" fill="{colour}" fill-opacity=".8"><title>{escape(name)}</title></polygon>'
                )
            else:
                path = " ".join(at(x, top) for x, _, top in points)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>')
                if self.dots:
                    parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.6" fill="{colour}"/>' for p in path.split()]
        for row, (x, label) in enumerate(self.events):
            px = at(x, y_low).split(",")[0]
            y = TOP + 9 + row % 3 * 12
            anchor = "end" if float(px) > WIDTH * 0.75 else "start"
            parts.append(f'<line x1="{px}" y1="{TOP}" x2="{px}" y2="{HEIGHT - BOTTOM}" class="event"/>'
                         f'<text x="{float(px) + (4 if anchor == "start" else -4)}" y="{y}" text-anchor="{anchor}" class="event-label">{escape(label)}</text>')  # fmt: skip
        data = {"x": [x_low, x_high], "area": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM], "series": series}
        legend = "".join(
            f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(name)} <b data-series="{escape(name, quote=True)}"></b></span>'
            for i, name in enumerate(series)
        )
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return (
            f"<figure class=\"chart\" data-chart='{escape(json.dumps(data), quote=True)}'><figcaption>{escape(self.title)}</figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title, quote=True)}">{"".join(parts)}'
            f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
            f'<div class="legend">{legend}<span class="where"></span></div>{note}</figure>'
        )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low..high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    first = math.floor(low / step)
    return [k * step for k in range(first, math.ceil(high / step) + 1)]


def smooth(points: Points, window: int) -> Points:
    """A running mean over the last `window` points."""
    smoothed: Points = []
    for i, (x, _) in enumerate(points):
        part = [y for _, y in points[max(0, i + 1 - window) : i + 1]]
        smoothed.append((x, sum(part) / len(part)))
    return smoothed


def thin(points: Points, most: int = 400) -> Points:
    """At most `most` of the points, evenly, the last one among them."""
    if len(points) <= most:
        return points
    stride = len(points) / most
    return [points[int(i * stride)] for i in range(most - 1)] + [points[-1]]


def _stack(series: dict[str, Points]) -> dict[str, list[tuple[float, float, float]]]:
    base: dict[float, float] = {}
    stacked = {}
    for name, points in series.items():
        stacked[name] = [(x, base.get(x, 0.0), base.get(x, 0.0) + y) for x, y in points]
        base.update({x: top for x, _, top in stacked[name]})
    return stacked


def _axes(at, y_ticks: list[float], x_ticks: list[float], x_low: float, x_high: float, y_low: float, y_label: str) -> str:  # type: ignore[no-untyped-def]
    parts = []
    for y in y_ticks:
        py = at(x_low, y).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}" class="grid"/>'
                     f'<text x="{LEFT - 7}" y="{float(py) + 4}" text-anchor="end">{_spell(y)}</text>')  # fmt: skip
    for x in x_ticks:
        if x_low <= x <= x_high:
            px = at(x, y_low).split(",")[0]
            parts.append(f'<text x="{px}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_spell(x)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle" class="axis">step</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="13" y="{middle}" transform="rotate(-90 13 {middle})" text-anchor="middle" class="axis">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _spell(value: float) -> str:
    if value and abs(value) < 1e-2:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
