"""Policies on real text: runs of about 1M parameters and 2M tokens on the twelve domains of the shared data, with paired seeds.

A seed fixes the initial weights and the order of every domain's sequences; policies differ in nothing but the draws. Every run is a run of the
trainer, in its own folder below `--out`, one core each: stop the program whenever you like, it goes on with what is not done. `--table` prints what
there is. What is finished is also written to `--results`, a small file that goes on in another place where the runs' folders are not. UniMax is not run: 2M tokens are not one epoch of any of these domains, so that its cap holds nothing and it is the uniform mixture.

    python experiments/mixing/runs.py --out mixing_runs --seeds 5
    python experiments/mixing/runs.py --out mixing_runs --table
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import carry_out, macro, parser, real_text, spell, steps_to

from regrowth.pretrain.config import RunConfig

STEPS, EVERY = 250, 25

POLICIES: dict[str, dict[str, Any]] = {
    "natural": {"policy": "static", "weights": "natural"},
    "uniform": {"policy": "static", "weights": "uniform"},
    "odm": {"policy": "odm", "initial": "natural", "warmup_steps": 25},
    "ado": {"policy": "ado", "initial": "natural", "warmup_steps": 50, "refit_every": 25, "ignore_steps": 10},
}
STATIC = ("natural", "uniform")


def config(out: Path, policy: str, seed: int) -> RunConfig:
    """The run of a policy and a seed: 0.9M parameters besides the embedding's, 250 steps of 8,192 tokens."""
    values = {
        "run": {"name": f"{policy}-{seed}", "folder": str(out / "runs"), "steps": STEPS, "seed": seed, "threads": 1},
        "data": real_text(out),
        "loader": {"sequence_length": 256, "global_batch": 32, "unit_sequences": 2, "seed": seed},
        "mixing": POLICIES[policy],
        "model": {"vocabulary": 2048, "width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32, "ffn_width": 384},
        "optimizer": {"lr": 2e-3},
        "parallel": {"micro_batch": 32},
        "checkpoint": {"every": 50, "keep": 2},
        "evaluation": {"every": EVERY, "sequences_per_domain": 20, "final_sequences_per_domain": 20},
    }
    return RunConfig.model_validate(values)


def show(curves_of: dict[str, dict[str, dict[str, float]]], seeds: int) -> None:
    """The table: macro loss, paired differences to natural, steps to the best static mix's final loss, perplexity by domain."""
    console = Console(width=150)
    found = {policy: [curves_of.get(f"{policy}-{seed}") for seed in range(seeds)] for policy in POLICIES}
    paired = [seed for seed in range(seeds) if all(found[policy][seed] for policy in POLICIES)]
    if not paired:
        console.print("no seed is finished for all policies yet.")
        return
    curves = {policy: [curve for seed in paired if (curve := found[policy][seed])] for policy in POLICIES}
    final = {policy: [curve[str(STEPS)] for curve in curves[policy]] for policy in POLICIES}
    best = min(STATIC, key=lambda policy: float(np.mean([macro(losses) for losses in final[policy]])))
    table = Table(
        "policy",
        "macro loss",
        "macro perplexity",
        "to natural, paired",
        "to uniform, paired",
        f"steps to {best}'s end",
        title=f"{len(paired)} seeds",
    )
    for policy in POLICIES:
        macros = [macro(losses) for losses in final[policy]]
        against = {o: spell([a - macro(b) for a, b in zip(macros, final[o], strict=True)]) for o in ("natural", "uniform")}
        steps = [steps_to(curve, macro(end)) for curve, end in zip(curves[policy], final[best], strict=True)]
        came = [s for s in steps if math.isfinite(s)]
        told = f"{np.mean(came):.0f} ({len(came)} of {len(steps)})" if came else "never"
        table.add_row(policy, f"{np.mean(macros):.4f}", f"{math.exp(np.mean(macros)):.1f}", against["natural"], against["uniform"], told)
    console.print(table)
    domains = sorted(final["natural"][0])
    each = Table("domain", *POLICIES, title="perplexity per token, geometric mean over seeds")
    for domain in domains:
        each.add_row(domain, *(f"{math.exp(np.mean([losses[domain] for losses in final[policy]])):.1f}" for policy in POLICIES))
    console.print(each)


def main() -> None:
    """Train what is missing, then print the table."""
    options = parser(__doc__, "mixing_runs", 5).parse_args()
    wanted = [(policy, seed) for seed in range(options.seeds) for policy in POLICIES]
    curves = carry_out(options, __file__, config, wanted)
    if curves is not None:
        show(curves, options.seeds)


if __name__ == "__main__":
    main()
