"""A grid of runs by name and seed: each in a process of its own, begun again where it was stopped, and what is finished kept in one small file.

An experiment gives the config of each run. A program that uses it is called for a single run with `--run NAME SEED`.
"""

import argparse
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from regrowth.data_pipeline.prepare import prepare
from regrowth.errors import UserError
from regrowth.files import fingerprint, read_json, write_json
from regrowth.launch.intervals import interval, spell
from regrowth.launch.training import run_training
from regrowth.pretrain.checkpoint import newest_whole
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder

DATA = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))

__all__ = ["interval", "spell"]  # for the experiments, which have them from here

Curve = dict[str, dict[str, float]]  # by step: nats per token by domain
Wanted = Sequence[tuple[str, int]]  # names and seeds, the most wanted first


@dataclass(frozen=True)
class Grid:
    """Runs below `out`; `results` is what goes on in another place where the runs' folders are not.

    Args:
        config: the config of a name and a seed, with its folders below a folder.
        trunk: the run that one begins as and that ends where their ways part; trained once for all that have it, and before them.
    """

    program: Path
    out: Path
    results: Path
    config: Callable[[Path, str, int], RunConfig]
    trunk: Callable[[str], str | None]

    def folders(self, name: str, seed: int) -> list[RunFolder]:
        """The folders of a run; those of another config, of an older state of the program, are not looked at."""
        found = [RunFolder(path) for path in sorted((self.out / "runs").glob(f"*_{name}-{seed}*")) if (path / "config.toml").exists()]
        return [run for run in found if self._is_of(run, self.config(self.out, name, seed))]

    @staticmethod
    def _is_of(run: RunFolder, wanted: RunConfig) -> bool:
        try:
            return run.config() == wanted
        except UserError:  # of another version
            return False

    def train(self, name: str, seed: int) -> None:
        """One run, from where it stands."""
        there = self.folders(name, seed)
        run_training(self.config(self.out, name, seed), Console(), there[-1] if there else self._branch(name, seed))

    def _branch(self, name: str, seed: int) -> RunFolder | None:
        """A new run that goes on from the end of its trunk, if that is trained; the trunk's curve becomes its own."""
        trunk = self.trunk(name)
        done = next((run for run in self.folders(trunk, seed) if run.finished), None) if trunk else None
        checkpoint = newest_whole(done.path)[0] if done else None
        if done is None or checkpoint is None:
            return None
        run = RunFolder.create(self.config(self.out, name, seed))
        shutil.copy(done.path / "data.json", run.path)
        for log in ("metrics", "mixing", "evaluations"):
            for row in done.rows(log):
                if not row.get("final"):
                    run.log(log, row)
        copy = run.path / "checkpoints" / f".{checkpoint.name}"  # a copy that is cut off is no checkpoint, and the run begins from nothing
        shutil.copytree(checkpoint, copy)
        copy.rename(copy.with_name(checkpoint.name))
        return run

    def train_all(self, wanted: Wanted, at_once: int) -> None:
        """What is not finished, in its order."""
        done = self.gather(wanted)
        missing = [(name, seed) for name, seed in wanted if f"{name}-{seed}" not in done]
        if not missing:
            return
        data = self.config(self.out, *missing[0]).data
        assert data is not None
        prepare(data)
        logs = self.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        began: dict[tuple[str, int], Future[int]] = {}

        def one(which: tuple[str, int]) -> int:
            trunk = began.get((str(self.trunk(which[0])), which[1]))
            if trunk:  # it stands before this one in the queue, and so it runs or has run
                trunk.result()
            command = [sys.executable, str(self.program), "--out", str(self.out), "--run", which[0], str(which[1])]
            with (logs / f"{which[0]}-{which[1]}.log").open("a") as log:
                code = subprocess.run(command, stdout=log, stderr=log).returncode
            self.gather([which])
            return code

        with ThreadPoolExecutor(at_once) as pool:
            for which in missing:
                began[which] = pool.submit(one, which)
            for which, run in track(began.items(), "runs"):
                if code := run.result():
                    print(f"{which[0]}, seed {which[1]}: ended with exit code {code}; see {logs}")

    def gather(self, wanted: Wanted) -> dict[str, Curve]:
        """The curves of the finished runs among those, by name. What is new is added to the results file."""
        stored = read_json(self.results) if self.results.exists() else {}
        before = dict(stored)
        for name, seed in wanted:
            run = next((run for run in self.folders(name, seed) if run.finished), None)
            if run is not None:
                curve = {str(row["step"]): {d: round(s["loss"], 5) for d, s in row["domains"].items()} for row in run.rows("evaluations")}
                seconds = round(
                    float(np.median([row["seconds"] for row in run.rows("metrics")])), 4
                )  # of a step, whatever else the machine did
                stored[f"{name}-{seed}"] = {"config": self._hash(name, seed), "curve": curve, "seconds": seconds}
        if stored != before:
            write_json(self.results, stored)
        hashes = {f"{name}-{seed}": self._hash(name, seed) for name, seed in wanted}
        return {name: stored[name]["curve"] for name, its in hashes.items() if name in stored and stored[name]["config"] == its}

    def _hash(self, name: str, seed: int) -> str:
        """Of what the experiment says of a run, wherever it lies; settings that came later, and whose defaults it takes, are no other run."""
        return fingerprint(
            self.config(Path("anywhere"), name, seed).model_dump(mode="json", exclude={"data": {"sources"}}, exclude_unset=True)
        )


def real_text(out: Path) -> dict[str, Any]:
    """The `data` of a run: twelve domains of real text, prepared once below a folder for all runs."""
    return {
        "out": str(out / "prepared"),
        "name": "twelve",
        "sources": [{"kind": "jsonl", "path": str(DATA / "corpora")}],
        "tokenizer": {"vocabulary": 2048, "sample_megabytes": 8.0},
        "heldout_fraction": 0.08,
    }


def parser(description: str | None, name: str, seeds: int) -> argparse.ArgumentParser:
    """The options that every such program has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path(name), help="the runs' folders")
    options.add_argument("--results", type=Path, default=Path(__file__).parents[1] / f"docs/results/{name}.json")
    options.add_argument("--seeds", type=int, default=seeds)
    options.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    options.add_argument("--table", action="store_true", help="train nothing")
    options.add_argument("--run", nargs=2, metavar=("NAME", "SEED"), help="train only this one")
    return options


def carry_out(
    options: argparse.Namespace,
    program: str,
    config: Callable[[Path, str, int], RunConfig],
    wanted: Wanted,
    shown: Wanted = (),
    trunk: Callable[[str], str | None] = lambda name: None,
) -> dict[str, Curve] | None:
    """Do what the options ask for; the finished curves of what is wanted, and of what is only shown. None: there is nothing to show."""
    if not DATA.exists():
        print(f"skipped: needs the shared data in {DATA}")
        return None
    grid = Grid(Path(program), options.out, options.results, config, trunk)
    if options.run:
        grid.train(options.run[0], int(options.run[1]))
        return None
    if not options.table:
        grid.train_all(wanted, options.at_once)
    return grid.gather([*wanted, *shown])


def macro(losses: dict[str, float]) -> float:
    """Mean over domains of nats per token; its exponential is the macro perplexity."""
    return float(np.mean(list(losses.values())))


def points(curve: Curve) -> list[tuple[int, float]]:
    """(step, macro loss), in order."""
    return sorted((int(step), macro(losses)) for step, losses in curve.items())


def steps_to(curve: Curve, loss: float) -> float:
    """The step at which a curve of macro losses first comes to a loss, between evaluations in a straight line; infinite if it never does."""
    for (a, high), (b, low) in itertools.pairwise(points(curve)):
        if low <= loss:
            return b if high <= loss else a + (b - a) * (high - loss) / (high - low)
    return math.inf
