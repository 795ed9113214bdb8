"""Recycling mixtures of experts: noise on duplicated experts, interposing against stacking on a young and on a trained base, recycling against scratch.

Models of about 1M active parameters on real text, paired by seed, three seeds. After its growth every model is given the same extra FLOPs; `scratch-*` is the grown model given just those.
Resumable, as `runs.py`, whose settings it shares.

    python experiments/growth/experts.py --out expert_runs
    python experiments/growth/experts.py --out expert_runs --table
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import runs
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Curve, carry_out, parser, spell

from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.growth.plan import GrowthPlan
from regrowth.pretrain.model_config import ModelConfig

EXTRA = 1.0e13  # FLOPs after the growth
YOUNG, TRAINED = 40, 250  # steps of the base
BASE = {**runs.LARGE, "layers": 4, "moe": {"experts": 4, "top_k": 2, "expert_width": 128, "pattern": ["moe"]}}
NOISES = (0.0, 0.01, 0.05, 1.0)
DUPLICATE = {"op": "duplicate_experts"}

# The base's steps, and the growth.
ROWS: dict[str, tuple[int, dict[str, Any]]] = {f"duplicate-noise{noise:g}": (TRAINED, {**DUPLICATE, "noise": noise}) for noise in NOISES}
for age, steps in (("young", YOUNG), ("trained", TRAINED)):
    ROWS |= {f"{op}-{age}": (steps, {"op": op}) for op in ("stack", "interpose")}
ROWS |= {"scratch-wider": (0, DUPLICATE), "scratch-deeper": (0, {"op": "stack"})}


def grown(name: str) -> ModelConfig:
    """The model that a row ends with."""
    return GrowthPlan.model_validate({"operators": [ROWS[name][1]]}).configs(ModelConfig.model_validate(BASE))[-1]


def steps_of(name: str) -> int:
    """The base's and those that `EXTRA` buys."""
    return ROWS[name][0] + round(EXTRA / (runs.TOKENS * grown(name).train_flops_per_token(runs.LENGTH)))


TRUNKS = {f"base-{steps}": steps for steps in (YOUNG, TRAINED)}  # trained once for all rows


def trunk(name: str) -> str | None:
    """The run that another begins as."""
    steps = TRUNKS[name] - 1 if name in TRUNKS else ROWS[name][0]
    return max((other for other, its in TRUNKS.items() if its <= steps), key=lambda other: TRUNKS[other], default=None)


def config(out: Path, name: str, seed: int) -> RunConfig:
    """The run of a row or a trunk, and a seed."""
    values = runs.config(out, "scratch", seed).model_dump(exclude_none=True, exclude_unset=True)
    if name in TRUNKS:
        values["run"] |= {"name": f"{name}-{seed}", "steps": TRUNKS[name]}
        return RunConfig.model_validate({**values, "model": BASE, "schedule": {**values["schedule"], "decay_fraction": 0.0}})
    base, growth = ROWS[name]
    values["run"] |= {"name": f"{name}-{seed}", "steps": steps_of(name)}
    values["model"] = BASE if base else grown(name).model_dump()
    if base:
        values["growth"] = [{"at_step": base, "operators": [growth], "seed": seed}]
    return RunConfig.model_validate(values)


def show(curves: dict[str, Curve], seeds: int) -> None:
    """End losses, and differences within each question."""
    pairs = [
        *((f"duplicate-noise{noise:g}", "duplicate-noise0") for noise in NOISES[1:]),
        *((f"interpose-{age}", f"stack-{age}") for age in ("young", "trained")),
        ("duplicate-noise0.01", "scratch-wider"),
        ("interpose-trained", "scratch-deeper"),
    ]
    table = Table("row", "base's steps", "steps", "macro loss", "seeds")
    ends = {name: {s: runs.end(curves[f"{name}-{s}"]) for s in range(seeds) if f"{name}-{s}" in curves} for name in ROWS}
    for name, its in ends.items():
        if its:
            table.add_row(name, str(ROWS[name][0]), str(steps_of(name)), f"{np.mean(list(its.values())):.4f}", str(len(its)))
    Console(width=120).print(table)
    against = Table("row", "beside", "paired difference")
    for name, other in pairs:
        if both := ends[name].keys() & ends[other].keys():
            against.add_row(name, other, spell([ends[name][s] - ends[other][s] for s in sorted(both)]))
    Console(width=120).print(against)


def main() -> None:
    """Train what is missing, then print the tables."""
    options = parser(__doc__, "expert_runs", 3).parse_args()
    wanted = [(name, seed) for seed in range(options.seeds) for name in (*TRUNKS, *ROWS)]
    curves = carry_out(options, __file__, config, wanted, trunk=trunk)
    if curves is not None:
        show(curves, options.seeds)


if __name__ == "__main__":
    main()
