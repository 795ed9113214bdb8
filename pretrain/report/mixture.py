"""The mixture of a run over its steps, as a page: what was drawn from, what was drawn, what it cost, what the policy made of it."""

from pathlib import Path
from typing import Any

from regrowth.data_pipeline.mixing.decisions import Segment, losses_of, read_log, segments
from regrowth.files import write_text
from regrowth.pretrain.report.build import template
from regrowth.pretrain.report.chart import Chart, Points, smooth, thin

Series = dict[str, Points]


def write_mixture(run: Path, out: Path) -> Path:
    """Write the page and return its path.

    Raises:
        UserError: the run has no decision log.
    """
    stretches = list(segments(read_log(run)))
    shares, drawn, losses, rewards = _series(stretches)
    marks = [(float(s.rows[0]["step"]), s.decided_by["mixing"]["policy"]) for s in stretches[1:]]
    steps = sum(len(s.rows) for s in stretches)
    window = max(1, steps // 40)
    smoothed = lambda series: {d: thin(smooth(points, window)) for d, points in series.items()}  # noqa: E731
    by = stretches[-1].decided_by
    charts = [
        Chart("What was drawn from", "share", {d: thin(p) for d, p in shares.items()}, marks, stacked=True),
        Chart("What was drawn", "share", smoothed(drawn), marks, stacked=True, note=f"Running mean of {window} steps."),
        Chart("Training loss, by domain", "nats per token", smoothed(losses), marks, note=f"Running mean of {window} steps."),
    ]
    if any(rewards.values()):
        charts.append(
            Chart("What the policy had learnt", _reward_label(by["mixing"]["policy"]), {d: thin(p) for d, p in rewards.items()}, marks)
        )
    page = template("mixture.html.jinja").render(
        name=run.resolve().name,
        subtitle=f"{steps} steps · policy {by['mixing']['policy']} · {len(by['domains'])} domains",
        charts=[chart.svg() for chart in charts],
        domains=_domains(stretches[-1], losses),
    )
    write_text(out, page)
    return out


def _series(stretches: list[Segment]) -> tuple[Series, Series, Series, Series]:
    """Points by domain: shares drawn from, shares drawn, losses, rewards. A domain's shares are 0 before it joined and after it left."""
    names = list(dict.fromkeys(domain for s in stretches for domain in s.decided_by["domains"]))
    shares, drawn, losses, rewards = ({name: [] for name in names} for _ in range(4))
    for stretch in stretches:
        place = {name: i for i, name in enumerate(stretch.decided_by["domains"])}
        for row in stretch.rows:
            step, loss = float(row["step"]), losses_of(row)
            for name in names:
                i = place.get(name)
                shares[name].append((step, 0.0 if i is None else row["probabilities"][i]))
                drawn[name].append((step, 0.0 if i is None else row["draws"].count(i) / len(row["draws"])))
                if i in loss:
                    losses[name].append((step, loss[i]))
                if i is not None and row["rewards"]:
                    rewards[name].append((step, row["rewards"][i]))
    return shares, drawn, losses, rewards


def _reward_label(policy: str) -> str:
    return {"ado": "exponent of the scaling law", "exp3": "log weight", "doremi": "log weight"}.get(policy, "reward")


def _domains(stretch: Segment, losses: Series) -> list[dict[str, Any]]:
    last = stretch.rows[-1]
    unit = stretch.decided_by["loader"]["unit_sequences"]
    rows = []
    for i, name in enumerate(stretch.decided_by["domains"]):
        epoch, _, _, taken = last["cursors"][i]
        rows.append(
            {
                "name": name,
                "share": f"{last['probabilities'][i]:.2%}",
                "drawn": f"{taken + unit * last['draws'].count(i):,} sequences",
                "epochs": epoch + 1 if taken else 0,
                "loss": f"{losses[name][-1][1]:.3f}" if losses[name] else "–",
            }
        )
    return rows
