"""Collects what a run left behind and renders it."""

import json
import math
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import UserError
from regrowth.files import read_json, write_text
from regrowth.parallel.plan import ParallelPlan
from regrowth.parallel.planner import Prediction
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.lineage import read_lineage
from regrowth.pretrain.report.chart import Chart, Points, smooth, thin
from regrowth.pretrain.report.lineage_graph import lineage_svg
from regrowth.pretrain.report.uptime import uptime
from regrowth.pretrain.run_folder import RunFolder

Rows = list[dict[str, Any]]


def write_report(run: RunFolder, corpus: Corpus | None, prediction: Prediction | None = None) -> Path:
    """Write `report.html` into the run's folder and return its path; works at any time in a run's life.

    Raises:
        UserError: the run has no step yet.
    """
    metrics, evaluations, events = run.rows("metrics"), run.rows("evaluations"), run.rows("events")
    if not metrics:
        raise UserError(f"{run.path}: nothing to report yet, no step is done. Its logs are in {run.path}/logs.")
    config = run.config()
    checkpoints = list_checkpoints(run.path)
    lineage = read_lineage(checkpoints[-1]) if checkpoints else None
    baseline = read_json(run.path / "baseline.json") if (run.path / "baseline.json").exists() else {}
    html = template("template.html.jinja").render(
        name=run.path.name,
        subtitle=_subtitle(config, metrics, run),
        cards=_cards(metrics, evaluations, baseline, lineage),
        charts=[chart.svg() for chart in _charts(run, metrics, evaluations, events)],
        domains=_domains(evaluations, baseline, lineage.tokens_by_domain if lineage else {}, corpus),
        funnel=_funnel(corpus) if corpus else [],
        events=[_event(event) for event in events if event["event"] != "checkpoint"],
        lineage=lineage.lines() if lineage else [],
        lineage_graph=lineage_svg(lineage) if lineage else "",
        uptime=_uptime(metrics, events),
        plan=_plan(prediction, metrics),
        plan_note=_plan_note(run.plan(config)),
        sample=read_json(run.path / "sample.json") if (run.path / "sample.json").exists() else None,
        environment=_environment(read_json(run.path / "environment.json")),
        config=(run.path / "config.toml").read_text(encoding="utf-8"),
    )
    write_text(run.path / "report.html", html)
    return run.path / "report.html"


def template(name: str) -> Any:
    """One of the pages of this folder."""
    import jinja2

    return jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(name)


def _subtitle(config: RunConfig, metrics: Rows, run: RunFolder) -> str:
    state = "finished" if run.finished else f"at step {metrics[-1]['step'] + 1}"
    plan = run.plan(config)
    return f"{config.run.steps} steps, {state} · {plan.world_size} ranks (dp_replicate {plan.dp_replicate} x dp_shard {plan.dp_shard}) · mixing {config.mixing.policy} · precision {config.precision.recipe}"


def _cards(metrics: Rows, evaluations: Rows, baseline: dict[str, Any], lineage: Any) -> list[dict[str, Any]]:
    last = evaluations[-1] if evaluations else None
    cards: list[dict[str, Any]] = []
    if last:
        better = baseline and last["bits_per_byte"] < baseline["bits_per_byte"]
        cards.append({"value": f"{last['bits_per_byte']:.3f}", "label": "held-out bits per byte", "good": better})
    if baseline:
        cards.append({"value": f"{baseline['bits_per_byte']:.3f}", "label": "byte trigram on the same text"})
    if lineage:
        cards.append({"value": _big(lineage.tokens), "label": "training tokens"})
        sunk = lineage.parents[-1].train_flops if lineage.parents else 0.0
        label = f"training FLOPs, {sunk / lineage.train_flops:.0%} of them sunk in ancestors" if sunk else "training FLOPs"
        cards.append({"value": f"{lineage.train_flops:.2g}", "label": label})
    seconds = sum(row["seconds"] for row in metrics)
    cards.append({"value": f"{seconds / 60:.1f} min", "label": "in training steps"})
    cards.append({"value": _big(sum(r["tokens"] for r in metrics) / seconds), "label": "tokens per second"})
    return cards


def _uptime(metrics: Rows, events: Rows) -> list[dict[str, str]]:
    told = uptime(metrics, events)
    if told is None:
        return []
    parts = [("steps that count (goodput)", told.steps), ("steps done again after failures", told.again)]
    parts += [(f"from there to the start anew: {cause}", seconds) for cause, seconds in sorted(told.down.items())]
    rest = max(0.0, told.life - sum(seconds for _, seconds in parts))
    parts.append(("start-up, evaluations, checkpoints", rest))
    rows = [
        {"what": what, "seconds": f"{s:,.0f}", "share": f"{s / told.life:.1%}" if told.life else "–"}
        for what, s in parts
        if s or what[0] == "s"
    ]
    return [*rows, {"what": "failures", "seconds": str(told.failures), "share": ""}]


def _charts(run: RunFolder, metrics: Rows, evaluations: Rows, events: Rows) -> list[Chart]:
    marks = [
        (float(e["step"]), _short(e))
        for e in events
        if e["event"] in ("growth", "precision", "failed", "resumed", "skipped step", "linear goes wide") and e.get("step")
    ]
    seen: set[tuple[float, str]] = set()
    marks = [m for m in marks if not (m in seen or seen.add(m))][:12]
    domains = list(dict.fromkeys(domain for row in metrics for domain in row["mixture"]))  # some may have joined on the way
    window = max(1, len(metrics) // 40)
    by_domain = {d: [(r["step"], r["domain_loss"][d]) for r in metrics if r["domain_loss"].get(d) is not None] for d in domains}
    losses: dict[str, Points] = {"all": thin(smooth([(r["step"], r["loss"]) for r in metrics if r["loss"] is not None], window))}
    losses |= {d: thin(smooth(points, window)) for d, points in by_domain.items()}
    bits = {"all": [(r["step"], r["bits_per_byte"]) for r in evaluations]}
    bits |= {d: [(r["step"], r["domains"][d]["bits_per_byte"]) for r in evaluations if d in r["domains"]] for d in domains}
    column = lambda key: thin([(r["step"], r[key]) for r in metrics if r.get(key) is not None])  # noqa: E731
    charts = [
        Chart(
            "Training loss, by domain", "nats per token", losses, marks, note=f"Running mean of {window} steps; each token weighs the same."
        ),
        Chart("Held-out bits per byte", "bits per byte", bits, marks, dots=True),
        Chart(
            "Mixture: what the policy draws from",
            "share",
            {d: thin([(r["step"], r["mixture"].get(d, 0.0)) for r in metrics]) for d in domains},
            marks,
            stacked=True,
        ),
        Chart("Learning rate", "learning rate", {"lr": column("lr")}, marks, from_zero=True),
        Chart("Throughput", "tokens per second", {"tokens/s": thin(smooth(column("tokens_per_second"), window))}, marks, from_zero=True),
        Chart("Gradient norm before clipping", "norm", {"norm": thin(smooth(column("grad_norm"), window))}, marks, from_zero=True),
    ]
    if any(r.get("mfu") for r in metrics):
        charts.append(Chart("Model FLOPs utilisation (full attention)", "share of peak", {"MFU": column("mfu")}, marks, from_zero=True))
    if rounding := run.rows("precision"):
        charts.append(_rounding(rounding, marks))
    return charts


def _rounding(rows: Rows, marks: list[tuple[float, str]]) -> Chart:
    """The largest error of rounding over all linears, by operand."""
    worst: dict[str, Points] = {}
    for row in rows:
        for operand in dict.fromkeys(op for errors in row["errors"].values() for op in errors):
            error = max(errors.get(operand, 0.0) for errors in row["errors"].values())
            worst.setdefault(operand, []).append((row["step"], error))
    return Chart("Error of rounding, the worst linear's", "|Q(x) - x| / |x|", worst, marks, from_zero=True, dots=True,
                 note="By product and operand: a is the activation or the gradient, b the weight or what the gradient multiplies.")  # fmt: skip


def _short(event: dict[str, Any]) -> str:
    if event["event"] == "growth":
        return f"{event['op']}: {event['layers'][0]} → {event['layers'][1]} layers"
    if event["event"] == "precision":
        return f"precision: {event['recipe']}"
    if event["event"] == "linear goes wide":
        return f"{event['linear']} goes wide"
    return event["event"]


def _domains(evaluations: Rows, baseline: dict[str, Any], tokens: dict[str, int], corpus: Corpus | None) -> list[dict[str, str]]:
    if not evaluations:
        return []
    rows = []
    trigram = baseline.get("domains", {})
    for name, score in evaluations[-1]["domains"].items():
        own, other = score["bits_per_byte"], trigram.get(name)
        read = tokens.get(name, 0)
        epochs = f"{read / corpus.tokens('train', name):.2f}" if corpus and name in corpus.domains else "–"
        rows.append({"name": name, "tokens": f"{read:,}", "epochs": epochs, "loss": f"{score['loss']:.3f}", "bits": f"{own:.3f}",
                     "trigram": f"{other:.3f}" if other else "–", "saved": f"{1 - own / other:.0%}" if other else "–"})  # fmt: skip
    return rows


def _funnel(corpus: Corpus) -> list[dict[str, Any]]:
    order = ["source", *(t["kind"] for t in corpus.manifest["config"]["transforms"]), "split_train", "split_heldout"]
    table: dict[str, dict[str, dict[str, tuple[int, int]]]] = {}
    for domain, transform, reason, documents, bytes_ in corpus.manifest["funnel"]:
        table.setdefault(domain, {}).setdefault(transform, {})[reason] = (documents, bytes_)
    rows = []
    for domain, steps in sorted(table.items()):
        tokens = sum(corpus.tokens(split, domain) for split in ("train", "heldout")) if domain in corpus.domains else 0
        text = sum(row["text_bytes"] for split in ("train", "heldout") for row in corpus.manifest["splits"][split].get(domain, []))
        per_byte = tokens / text if text else 0.0
        first = steps.get("source", {}).get("", (0, 1))[1] or 1
        for transform in order:
            if transform not in steps:
                continue
            documents, bytes_ = steps[transform].get("", (0, 0))
            dropped = ", ".join(
                f"{reason.replace('_', ' ')} {count:,}" for reason, (count, _) in sorted(steps[transform].items()) if reason
            )
            split = transform.removeprefix("split_") if transform.startswith("split_") else None
            count = f"{corpus.tokens(split, domain):,}" if split and domain in corpus.domains else f"~{round(bytes_ * per_byte):,}"
            label = f"{split} split" if split else transform.replace("_", " ")
            rows.append(
                {
                    "domain": domain,
                    "transform": label,
                    "documents": f"{documents:,}",
                    "tokens": count,
                    "share": round(120 * bytes_ / first),
                    "dropped": dropped,
                }
            )
    return rows


def _event(event: dict[str, Any]) -> dict[str, str]:
    details = {k: v for k, v in event.items() if k not in ("event", "time", "step")}
    spelled = ", ".join(f"{k} {_arrow(v)}" for k, v in details.items() if v is not None)
    return {"step": str(event.get("step", 0)), "what": event["event"], "details": spelled}


def _arrow(value: Any) -> str:
    if isinstance(value, list):
        return " → ".join(_arrow(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plan(prediction: Prediction | None, metrics: Rows) -> list[dict[str, str]]:
    if prediction is None:
        return []
    tail = sorted(row["seconds"] for row in metrics if row["layers"] == metrics[-1]["layers"])
    median = tail[len(tail) // 2]
    memory = [row["peak_memory_bytes"] for row in metrics if row.get("peak_memory_bytes")]
    return [
        {"what": "seconds per step (final size)", "predicted": _seconds(prediction.step_seconds), "measured": f"{median:.3f}"},
        {"what": "peak memory per rank, MiB", "predicted": f"{prediction.memory_bytes / 2**20:,.0f}",
         "measured": f"{max(memory) / 2**20:,.0f}" if memory else "–"},
    ]  # fmt: skip


def _plan_note(plan: ParallelPlan) -> str:
    return (
        "Predicted from the plan and a description of the machine (configs/clusters). Memory counts weights, gradients, moments and activations; "
        f"on a CPU the measured figure is the whole process. Plan: {plan.world_size} ranks, micro-batch {plan.micro_batch}."
    )


def _seconds(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, str(value)) for key, value in environment.items() if key not in ("packages", "variables", "code")]
    if code := environment.get("code"):
        changes = f"yes, in code.patch{' (cut)' if code.get('patch_cut') else ''}" if code["dirty"] else "none"
        rows += [("commit", code["commit"]), ("uncommitted changes", changes)]
    if variables := environment.get("variables"):
        rows.append(("variables", ", ".join(f"{name}={value}" for name, value in variables.items())))
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    return [*rows, ("packages", packages)]


def _big(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def write_baseline(run: RunFolder, corpus: Corpus) -> dict[str, Any]:
    """Measure the byte trigram on the run's corpus and keep the result beside the run."""
    from regrowth.pretrain.ngram import ByteTrigram

    bits = ByteTrigram(corpus).bits(corpus)
    total_bits, total_bytes = (sum(x) for x in zip(*bits.values(), strict=True))
    baseline = {"bits_per_byte": total_bits / max(total_bytes, 1), "domains": {d: b / n for d, (b, n) in bits.items() if n}}
    (run.path / "baseline.json").write_text(json.dumps(baseline, indent=1), encoding="utf-8")
    return baseline
