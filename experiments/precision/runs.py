"""Each precision recipe against full precision: models of about 1M parameters and 2M tokens on real text, paired by seed, in emulation.

A seed fixes the data's order and the initial weights, so that rows differ in nothing but what their products are rounded to. The program goes on where it was stopped.
`--table` prints what there is.

    python experiments/precision/runs.py --out precision_runs --seeds 5
    python experiments/precision/runs.py --out precision_runs --table
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Curve, carry_out, parser, points, real_text, spell

from regrowth.files import read_json
from regrowth.pretrain.config import RunConfig

STEPS, TOKENS, LENGTH = 250, 8192, 256  # tokens of a step; of a sequence
DECAY = 0.2  # share of the steps in which the learning rate falls
EVERY = 25  # steps between evaluations
# Every dim is a multiple of 128, so that recipes with blocks of 128 fit.
MODEL = {"vocabulary": 2048, "width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32, "ffn_width": 384}

# The settings of [precision]; the paper's gap to its 16-bit baseline, in per cent of the loss, where it gives one.
ROWS: dict[str, dict[str, Any]] = {
    "fp32": {"recipe": "full"},
    "fp8_tensorwise": {"recipe": "fp8_tensorwise"},
    "fp8_rowwise": {"recipe": "fp8_rowwise"},
    "fp8_delayed": {"recipe": "fp8_delayed"},
    "fp8_deepseek": {"recipe": "fp8_deepseek"},
    "fp4_paper": {"recipe": "fp4_paper"},
    "fp4_paper-no-switch": {"recipe": "fp4_paper", "full_precision_last": 0.0},
    "fp4_dge_occ": {"recipe": "fp4_dge_occ"},
    "nvfp4": {"recipe": "nvfp4"},
    "nvfp4-forward-wide-last": {"recipe": "nvfp4", "full_precision_last": 0.18},
    "mxfp4_quartet": {"recipe": "mxfp4_quartet"},
}
PUBLISHED = {"nvfp4": "below 1, 1.5 at the end", "nvfp4-forward-wide-last": "about 0.5"}


def config(out: Path, name: str, seed: int) -> RunConfig:
    """The run of a row and a seed."""
    return RunConfig.model_validate({
        "run": {"name": f"{name}-{seed}", "folder": str(out / "runs"), "steps": STEPS, "seed": seed, "threads": 1},
        "data": real_text(out),
        "loader": {"sequence_length": LENGTH, "global_batch": TOKENS // LENGTH, "unit_sequences": 2, "seed": seed},
        "model": MODEL,
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": 20, "decay_fraction": DECAY},
        "precision": ROWS[name],
        "parallel": {"micro_batch": 16},
        "checkpoint": {"every": 100, "keep": 1},
        "evaluation": {"every": EVERY, "sequences_per_domain": 20, "final_sequences_per_domain": 20},
    })  # fmt: skip


def gap(mine: Curve, full: Curve, step: int) -> float:
    """How much higher the macro loss is at a step, in per cent."""
    return 100 * (dict(points(mine))[step] / dict(points(full))[step] - 1)


def before_the_switch(out: Path, name: str) -> int:
    """The last evaluated step before a recipe returns to wider products; the last of the run where it does not."""
    recipe = config(out, name, 0).precision.build()
    return (STEPS - round(recipe.full_precision_last * STEPS)) // EVERY * EVERY


def show(curves: dict[str, Curve], seeds: int, out: Path, seconds: dict[str, float]) -> None:
    """The table: end losses, gaps before the switch and at the end, and what emulation cost."""
    table = Table(
        "recipe", "macro loss", "gap before the switch, %", "gap at the end, %", "published, %", "time of a step, to fp32", "seeds"
    )
    for name in ROWS:
        its = [seed for seed in range(seeds) if f"{name}-{seed}" in curves and f"fp32-{seed}" in curves]
        if not its:
            continue
        pairs = [(curves[f"{name}-{seed}"], curves[f"fp32-{seed}"]) for seed in its]
        switch = before_the_switch(out, name)
        slower = [seconds[f"{name}-{s}"] / seconds[f"fp32-{s}"] for s in its if f"{name}-{s}" in seconds and f"fp32-{s}" in seconds]
        table.add_row(
            name,
            f"{np.mean([points(mine)[-1][1] for mine, _ in pairs]):.4f}",
            spell([gap(mine, full, switch) for mine, full in pairs], 2) if switch < STEPS and name != "fp32" else "",
            spell([gap(mine, full, STEPS) for mine, full in pairs], 2) if name != "fp32" else "",
            PUBLISHED.get(name, ""),
            f"{np.median(slower):.2f}" if slower else "",
            str(len(its)),
        )
    Console(width=150).print(table)


def main() -> None:
    """Train what is missing, then print the table."""
    options = parser(__doc__, "precision_runs", 5).parse_args()
    wanted = [(name, seed) for seed in range(options.seeds) for name in ROWS]
    curves = carry_out(options, __file__, config, wanted)
    if curves is not None:
        stored = read_json(options.results) if options.results.exists() else {}
        show(curves, options.seeds, options.out, {key: its["seconds"] for key, its in stored.items() if "seconds" in its})


if __name__ == "__main__":
    main()
