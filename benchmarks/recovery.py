"""What a failure costs a run of two ranks on this machine: its start-up, a killed rank, a hanging one, and what watching for them costs.

The ranks are really killed and really stopped. Limits: 15 s to the first step; 20 s from kill -9 to the first new step; a hang found within max(30 s, 5 x the
99th percentile of steps); at most one checkpoint interval of work lost; 0.5 % of a step for being watched.

    python benchmarks/recovery.py --quick
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from train_step import SHAPES, corpus_for_timing, run_config

from regrowth.parallel.heartbeat import Heartbeat
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import to_toml

EVERY = 20  # steps between checkpoints
BEATS = 3  # of a step: data, forward and backward, update


class Started:
    """A run of two ranks, by the command that users type."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        (folder / "run.toml").write_text(to_toml(config))
        self.runs = config.run.folder
        self.began = time.time()
        command = [sys.executable, "-m", "regrowth", "train", str(folder / "run.toml")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            self.wait(lambda: list(self.runs.glob("*/metrics.jsonl")))
        except BaseException:
            self.end()
            raise
        self.run = RunFolder(next(self.runs.glob("*/metrics.jsonl")).parent)

    def end(self) -> None:
        """Stop it, whatever it does."""
        self.process.terminate()
        self.process.wait()

    def wait(self, condition: Callable[[], Any], seconds: float = 300.0) -> float:
        """Until something is true; returns when."""
        until = time.time() + seconds
        while not condition():
            if time.time() > until or self.process.poll() is not None:
                raise SystemExit(f"it did not happen within {seconds:.0f} s; see {self.runs}")
            time.sleep(0.01)
        return time.time()

    def rank(self, rank: int) -> int:
        """The process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes())

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event for event in self.run.rows("events") if event["event"] == name]

    def steps(self) -> int:
        """Steps that count, so far."""
        return len(self.run.rows("metrics"))

    def first_new_step(self, after: int) -> float:
        """Wait for the next start's first step; returns when. `after`: starts anew before it."""
        self.wait(lambda: len(self.events("resumed")) > after)
        reached = self.events("resumed")[-1]["step"]
        return self.wait(lambda: self.steps() > reached)


def seconds_of_processor(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watching(started: Started, folder: Path) -> tuple[float, float]:
    """(share of one core that the launcher takes, share of a step that a rank's signs take)."""
    before, began = seconds_of_processor(started.process.pid), time.time()
    time.sleep(10)
    launcher = (seconds_of_processor(started.process.pid) - before) / (time.time() - began)
    heart, times = Heartbeat(folder / "beats", 0, 1), []
    for step in range(2000):
        now = time.perf_counter()
        heart.beat(step, "update")
        times.append(time.perf_counter() - now)
    step_seconds = statistics.median(row["seconds"] for row in started.run.rows("metrics"))
    return launcher, BEATS * statistics.median(times) / step_seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: without the hang")
    quick = parser.parse_args().quick
    table = Table("what", "measured", "limit", title="10M parameters on two ranks (FSDP2, gloo)",
                  caption="the limit is what each may take at most")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = run_config(SHAPES["10m"], corpus_for_timing(folder / "data"), 8, 256, 1).model_dump()
        values["parallel"] = {"dp_shard": 2, "micro_batch": 4}
        values["checkpoint"] = {"every": EVERY}
        started = Started(RunConfig.model_validate(values), folder)
        try:
            first = started.wait(lambda: started.steps() > 0)
            table.add_row("start-up, to the first step", f"{first - started.began:.1f} s", "15 s")
            started.wait(lambda: started.steps() > EVERY + EVERY // 2)
            launcher, signs = watching(started, folder)
            killed = time.time()
            os.kill(started.rank(1), signal.SIGKILL)
            again = started.first_new_step(0)
            lost = started.events("failed")[-1]["lost_steps"]
            table.add_row("kill -9 of a rank, to the first new step", f"{again - killed:.1f} s", "20 s")
            table.add_row("work lost", f"{lost} steps", f"{EVERY} steps")
            if not quick:
                reached = started.steps()
                started.wait(lambda: started.steps() > reached + EVERY)
                usual = max(30.0, 5 * float(np.percentile([row["seconds"] for row in started.run.rows("metrics")], 99)))
                stopped = time.time()
                os.kill(started.rank(1), signal.SIGSTOP)
                started.wait(lambda: len(started.events("failed")) > 1)
                found = started.events("failed")[-1]["time"] - stopped
                table.add_row("SIGSTOP of a rank, until it is found", f"{found:.1f} s", f"{usual:.0f} s, and looking once a second")
                table.add_row("... to the first new step", f"{started.first_new_step(1) - stopped:.1f} s", "")
            table.add_row("the launcher's share of a core", f"{launcher:.2%}", "")
            table.add_row("a rank's signs, share of a step", f"{signs:.3%}", "0.5%")
        finally:
            started.end()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
