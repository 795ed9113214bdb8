"""Policies on real text: runs of about 1M parameters and 2M tokens on the twelve domains of the shared data, with paired seeds.

A seed fixes the initial weights and the order of every domain's sequences; policies differ in nothing but the draws. Every run is a run of the
trainer, in its own folder below `--out`, one core each: stop the program whenever you like, it goes on with what is not done. `--table` prints what
there is. What is finished is also written to `--results`, a small file that goes on in another place where the runs' folders are not. UniMax is not run: 2M tokens are not one epoch of any of these domains, so that its cap holds nothing and it is the uniform mixture.

    python experiments/mixing/runs.py --out mixing_runs --seeds 5
    python experiments/mixing/runs.py --out mixing_runs --table
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from regrowth.data_pipeline.prepare import prepare
from regrowth.errors import UserError
from regrowth.files import fingerprint, read_json, write_json
from regrowth.launch.training import run_training
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder

DATA = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
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
        "data": {
            "out": str(out / "prepared"),
            "name": "twelve",
            "sources": [{"kind": "jsonl", "path": str(DATA / "corpora")}],
            "tokenizer": {"vocabulary": 2048, "sample_megabytes": 8.0},
            "heldout_fraction": 0.08,
        },
        "loader": {"sequence_length": 256, "global_batch": 32, "unit_sequences": 2, "seed": seed},
        "mixing": POLICIES[policy],
        "model": {"vocabulary": 2048, "width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32, "ffn_width": 384},
        "optimizer": {"lr": 2e-3},
        "parallel": {"micro_batch": 32},
        "checkpoint": {"every": 50, "keep": 2},
        "evaluation": {"every": EVERY, "sequences_per_domain": 20, "final_sequences_per_domain": 20},
    }
    return RunConfig.model_validate(values)


def runs(out: Path, policy: str, seed: int) -> list[RunFolder]:
    """The folders of a policy's run with a seed; those of another config, of an older state of this program, are not looked at."""
    found = [RunFolder(path) for path in sorted((out / "runs").glob(f"*_{policy}-{seed}*")) if (path / "config.toml").exists()]
    return [run for run in found if _is_of(run, config(out, policy, seed))]


def _is_of(run: RunFolder, wanted: RunConfig) -> bool:
    try:
        return run.config() == wanted
    except UserError:  # of another version
        return False


def train(out: Path, policy: str, seed: int) -> None:
    """One run, from where it stands."""
    there = runs(out, policy, seed)
    run_training(config(out, policy, seed), Console(), there[-1] if there else None)


def train_all(out: Path, results: Path, seeds: int, at_once: int) -> None:
    """What is not finished, seed by seed, so that every policy has as many; each in a process of its own, which writes to a log."""
    done = gather(out, results, seeds)
    wanted = [(policy, seed) for seed in range(seeds) for policy in POLICIES if f"{policy}-{seed}" not in done]
    if not wanted:
        return
    data = config(out, *wanted[0]).data
    assert data is not None
    prepare(data)
    (out / "logs").mkdir(parents=True, exist_ok=True)

    def one(which: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "--out", str(out), "--run", which[0], str(which[1])]
        with (out / "logs" / f"{which[0]}-{which[1]}.log").open("a") as log:
            return subprocess.run(command, stdout=log, stderr=log).returncode

    with ThreadPoolExecutor(at_once) as pool:
        for which, code in zip(wanted, track(pool.map(one, wanted), "runs", len(wanted)), strict=True):
            if code:
                print(f"{which[0]}, seed {which[1]}: ended with exit code {code}; see {out / 'logs'}")


def gather(out: Path, results: Path, seeds: int) -> dict[str, dict[str, dict[str, float]]]:
    """The curves of all finished runs, by name: nats per token by domain at each evaluation. What is new is added to the results file."""
    stored = read_json(results) if results.exists() else {}
    for seed, policy in itertools.product(range(seeds), POLICIES):
        run = next((run for run in runs(out, policy, seed) if run.finished), None)
        if run is not None:
            curve = {
                str(row["step"]): {domain: round(s["loss"], 5) for domain, s in row["domains"].items()} for row in run.rows("evaluations")
            }
            stored[f"{policy}-{seed}"] = {"config": of_config(policy, seed), "curve": curve}
    if stored:
        write_json(results, stored)
    wanted = {f"{policy}-{seed}": of_config(policy, seed) for seed, policy in itertools.product(range(seeds), POLICIES)}
    return {name: stored[name]["curve"] for name, its in wanted.items() if name in stored and stored[name]["config"] == its}


def of_config(policy: str, seed: int) -> str:
    """A hash of a run's config, wherever it lies."""
    return fingerprint(config(Path("anywhere"), policy, seed).model_dump(mode="json", exclude={"data": {"sources"}}))


def macro(losses: dict[str, float]) -> float:
    """Mean over domains of nats per token; its exponential is the macro perplexity."""
    return float(np.mean(list(losses.values())))


def confidence(differences: list[float]) -> str:
    """Mean and 95% interval (Student's t) of paired differences."""
    n = len(differences)
    if n < 2:
        return f"{np.mean(differences):+.4f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(n, 2.0)
    return f"{np.mean(differences):+.4f} ± {t * np.std(differences, ddof=1) / math.sqrt(n):.4f}"


def steps_to(curve: dict[str, dict[str, float]], loss: float) -> float:
    """The step at which a curve of macro losses first comes to a loss, between evaluations in a straight line; infinite if it never does."""
    points = sorted((int(step), macro(losses)) for step, losses in curve.items())
    for (a, high), (b, low) in itertools.pairwise(points):
        if low <= loss:
            return b if high <= loss else a + (b - a) * (high - loss) / (high - low)
    return math.inf


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
        against = {o: confidence([a - macro(b) for a, b in zip(macros, final[o], strict=True)]) for o in ("natural", "uniform")}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mixing_runs"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[2] / "docs/results/mixing_runs.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--run", nargs=2, metavar=("POLICY", "SEED"), help="train only this one")
    arguments = parser.parse_args()
    if not DATA.exists():
        print(f"skipped: needs the shared data in {DATA}")
        return
    if arguments.run:
        train(arguments.out, arguments.run[0], int(arguments.run[1]))
        return
    if not arguments.table:
        train_all(arguments.out, arguments.results, arguments.seeds, arguments.at_once)
    show(gather(arguments.out, arguments.results, arguments.seeds), arguments.seeds)


if __name__ == "__main__":
    main()
