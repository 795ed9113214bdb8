"""Growth against training from scratch at equal FLOPs, the base's included: models of about 1M parameters and 2M tokens on real text, paired by seed.

A seed fixes the data's order and the initial weights. The grown model and the scratch model are the same; what grows pays `SHARE` of the FLOPs for its base, and all
end with the same annealing. What several rows begin with is trained once. The program goes on where it was stopped. `--tune` compares learning rates of scratch and of stacking first; `--table` prints
what there is, and draws loss against FLOPs.

    python experiments/growth/runs.py --out growth_runs --tune
    python experiments/growth/runs.py --out growth_runs --seeds 5
    python experiments/growth/runs.py --out growth_runs --table
"""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Curve, carry_out, macro, parser, points, real_text, spell

from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.growth.plan import GrowthPlan
from regrowth.pretrain.model_config import ModelConfig

STEPS, TOKENS, LENGTH = 250, 8192, 256  # of scratch; tokens of a step; of a sequence
DECAY = 0.2  # share of the steps in which the learning rate falls
SHARE = 0.2  # of all FLOPs that the base takes
LR = 2e-3  # the best of RATES for scratch and for stacking (--tune)
LARGE = {"vocabulary": 2048, "width": 96, "layers": 8, "heads": 4, "kv_heads": 4, "head_dim": 24, "ffn_width": 256}
HALF_DEEP, QUARTER_DEEP = {**LARGE, "layers": 4}, {**LARGE, "layers": 2}
HALF_WIDE = {**LARGE, "width": 48, "heads": 2, "kv_heads": 2, "ffn_width": 128}
WIDER = {"width": 96, "kv_heads": 4, "ffn_width": 256}

# What grows: base and growth. `budget` (of scratch's FLOPs), `share`, `moments` and `lr` may differ.
ROWS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "scratch-less": {"budget": 0.7},
    "scratch-more": {"budget": 1.4},
    "stack2": {"base": HALF_DEEP, "growth": {"op": "stack"}},
    "stack4": {"base": QUARTER_DEEP, "growth": {"op": "stack", "factor": 4}},
    "interpose": {"base": HALF_DEEP, "growth": {"op": "interpose"}},
    "hyperclone": {"base": HALF_WIDE, "growth": {"op": "hyperclone"}},
    "fpi": {"base": HALF_WIDE, "growth": {"op": "fpi", **WIDER}},
    "aki": {"base": HALF_WIDE, "growth": {"op": "aki", **WIDER}},
    "zero-depth": {"base": HALF_DEEP, "growth": {"op": "stack", "zero_copies": True}},
    "zero-width": {"base": HALF_WIDE, "growth": {"op": "zero_pad", "heads": 4, **WIDER}},
    "random-width": {"base": HALF_WIDE, "growth": {"op": "random_pad", "heads": 4, "ramp_steps": 50, **WIDER}},
    "stack2-d0": {"base": HALF_DEEP, "growth": {"op": "stack"}, "share": 0.0},
    "stack2-fresh-moments": {"base": HALF_DEEP, "growth": {"op": "stack"}, "moments": "zero"},
}
MAIN = ("scratch", "scratch-less", "scratch-more", "stack2", "stack4", "interpose", "hyperclone")
MINOR_SEEDS = 3  # of the rows that are not among the main ones
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
ROWS |= {f"{name}-lr{rate:g}": {**ROWS[name], "lr": rate} for name in ("scratch", "stack2") for rate in RATES}


def flops(model: dict[str, Any]) -> float:
    """Training FLOPs of a step."""
    return float(TOKENS * ModelConfig.model_validate(model).train_flops_per_token(LENGTH))


def steps_of(name: str) -> tuple[int, int]:
    """Steps of the base, and steps in all."""
    row, budget = ROWS[name], ROWS[name].get("budget", 1.0) * STEPS * flops(LARGE)
    if "base" not in row:
        return 0, round(budget / flops(LARGE))
    base = round(row.get("share", SHARE) * budget / flops(row["base"]))
    return base, base + round((budget - base * flops(row["base"])) / flops(LARGE))


def beginning(name: str) -> tuple[str, dict[str, Any], int] | None:
    """What other rows may have in common with a row, as (name, model, steps): its base, or what is before the learning rate falls."""
    row, (base, steps) = ROWS[name], steps_of(name)
    if "lr" in row or row.get("share") == 0.0:
        return None
    model, steps = (row["base"], base) if base else (LARGE, steps - round(DECAY * steps))
    return f"first{steps}-{model['layers']}x{model['width']}", model, steps


def trunk(name: str) -> str | None:
    """The run that a row, or another such run, begins as."""
    if name in ROWS:
        return found[0] if (found := beginning(name)) else None
    model, steps = TRUNKS[name]
    shorter = [other for other, (its, n) in TRUNKS.items() if its is model and n < steps]
    return max(shorter, key=lambda other: TRUNKS[other][1], default=None)


TRUNKS = {found[0]: found[1:] for name in ROWS if (found := beginning(name))}


def config(out: Path, name: str, seed: int) -> RunConfig:
    """The run of a row or a trunk, and a seed."""
    if name in TRUNKS:
        model, steps = TRUNKS[name]
        values = config(out, "scratch", seed).model_dump(exclude_none=True, exclude_unset=True)
        values["run"] |= {"name": f"{name}-{seed}", "steps": steps}
        return RunConfig.model_validate({**values, "model": model, "schedule": {**values["schedule"], "decay_fraction": 0.0}})
    row, (base, steps) = ROWS[name], steps_of(name)
    values = {
        "run": {"name": f"{name}-{seed}", "folder": str(out / "runs"), "steps": steps, "seed": seed, "threads": 1},
        "data": real_text(out),
        "loader": {"sequence_length": LENGTH, "global_batch": TOKENS // LENGTH, "unit_sequences": 2, "seed": seed},
        "model": row.get("base", LARGE),
        "optimizer": {"lr": row.get("lr", LR)},
        "schedule": {"warmup_steps": 20, "decay_fraction": DECAY, "rewarm_steps": 10},
        "parallel": {"micro_batch": 32},
        "checkpoint": {"every": 100, "keep": 1},
        "evaluation": {"every": 25, "sequences_per_domain": 20, "final_sequences_per_domain": 20},
    }
    if "growth" in row:
        event = {"at_step": base, "operators": [row["growth"]], "moments": row.get("moments", "carry"), "seed": seed}
        values["growth"] = [event]
        assert GrowthPlan(operators=[row["growth"]]).configs(ModelConfig.model_validate(row["base"]))[-1].layers == LARGE["layers"]
    return RunConfig.model_validate(values)


def spent(name: str, step: int) -> float:
    """FLOPs of the first steps of a row."""
    base, _ = steps_of(name)
    return min(step, base) * flops(ROWS[name].get("base", LARGE)) + max(0, step - base) * flops(LARGE)


def end(curve: Curve) -> float:
    """Macro loss at the end of a run."""
    return points(curve)[-1][1]


def scratch_flops(loss: float, ends: list[tuple[float, float]]) -> float:
    """FLOPs from scratch that reach a loss: between annealed ends straight in the logarithm of FLOPs, and beyond them on in the same line.

    Args:
        ends: (FLOPs, loss) of runs from scratch of several lengths.
    """
    ends = sorted(ends)
    for (a, high), (b, low) in itertools.pairwise(ends):
        if loss >= low or (b, low) == ends[-1]:
            return math.exp(math.log(a) + (math.log(b) - math.log(a)) * (high - loss) / (high - low))
    raise AssertionError


def show(curves: dict[str, Curve], seeds: int) -> None:
    """The table: end losses, differences to scratch, and the speedup at equal loss; rows with the seeds that they have."""
    table = Table(
        "row", "base, steps", "steps", "FLOPs", "macro loss", "to scratch, paired", "speedup at equal loss", "seeds", title="growth"
    )
    for name in ROWS:
        if "-lr" in name:
            continue
        its = [seed for seed in range(seeds) if f"{name}-{seed}" in curves and f"scratch-{seed}" in curves]
        if not its:
            continue
        base, steps = steps_of(name)
        ends = [end(curves[f"{name}-{seed}"]) for seed in its]
        against = [mine - end(curves[f"scratch-{seed}"]) for mine, seed in zip(ends, its, strict=True)]
        speedups = []
        for mine, seed in zip(ends, its, strict=True):
            lengths = [row for row in ("scratch-less", "scratch", "scratch-more") if f"{row}-{seed}" in curves]
            if len(lengths) == 3 and not name.startswith("scratch"):
                scratch = [(spent(row, steps_of(row)[1]), end(curves[f"{row}-{seed}"])) for row in lengths]
                speedups.append(scratch_flops(mine, scratch) / spent(name, steps) - 1)
        table.add_row(
            name,
            str(base) if base else "",
            str(steps),
            f"{spent(name, steps):.3g}",
            f"{np.mean(ends):.4f}",
            "" if name == "scratch" else spell(against),
            spell([100 * s for s in speedups], 1) + " %" if speedups else "",
            str(len(its)),
        )
    Console(width=140).print(table)


def show_rates(curves: dict[str, Curve], seeds: int) -> None:
    """End losses by learning rate."""
    table = Table("learning rate", "scratch", "stack2", title="macro loss at the end")
    for rate in RATES:
        cells = [
            [end(curves[key]) for seed in range(seeds) if (key := f"{row}-lr{rate:g}-{seed}") in curves] for row in ("scratch", "stack2")
        ]
        table.add_row(f"{rate:g}", *(f"{np.mean(ends):.4f} ({len(ends)} seeds)" if ends else "" for ends in cells))
    Console(width=100).print(table)


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Loss against FLOPs, the mean over seeds at each evaluation, as an SVG picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name in ROWS:
        its = [curve for key, curve in curves.items() if key.rsplit("-", 1)[0] == name]
        if its and "-lr" not in name and name not in ("scratch-less", "scratch-more"):
            steps = [step for step, _ in points(its[0])]
            losses = [np.mean([macro(curve[str(step)]) for curve in its]) for step in steps]
            axes.plot([spent(name, step) for step in steps][1:], losses[1:], label=name, lw=2.5 if name == "scratch" else 1.2)
    axes.set(xlabel="training FLOPs, the base's included", ylabel="macro loss, nats per token")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    """Train what is missing, then print the tables."""
    options = parser(__doc__, "growth_runs", 5)
    options.add_argument("--tune", action="store_true", help="only the comparison of learning rates, with one seed")
    options.add_argument("--draw", type=Path, metavar="SVG", help="draw loss against FLOPs (needs matplotlib)")
    options = options.parse_args()
    tuned = [(name, 0) for name in ROWS if "-lr" in name]
    rows = []
    for seed in range(options.seeds):
        names = [name for name in ROWS if "-lr" not in name and (name in MAIN or seed < MINOR_SEEDS)]
        trunks = [name for name in TRUNKS if name in map(trunk, [*names, *TRUNKS])]
        rows += [(name, seed) for name in sorted(trunks, key=lambda name: TRUNKS[name][1]) + names]
    curves = carry_out(options, __file__, config, *((tuned, rows) if options.tune else (rows, tuned)), trunk=trunk)
    if curves is None:
        return
    show_rates(curves, 1)
    show(curves, options.seeds)
    if options.draw:
        draw(curves, options.draw)


if __name__ == "__main__":
    main()
