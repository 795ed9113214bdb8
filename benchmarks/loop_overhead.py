"""What the loop costs beside the model's step: drawing, building the batch, mixing, accounting, heartbeats, metrics and logs, in one process.

Two processes that run the same loop differ by a few percent in how their memory lies; so the engine's calls are timed inside the trainer's step, and
what is left of it is the loop. The aim is 2% at most.

    python benchmarks/loop_overhead.py --quick
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from train_step import SHAPES, corpus_for_timing, run_config

from regrowth.parallel.heartbeat import Heartbeat
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.session import prepare_process
from regrowth.pretrain.trainer import Trainer


def timed(owner: Any, name: str, spent: dict[str, list[float]]) -> None:
    """Let a method note its seconds under its name."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = method(*args, **kwargs)
        spent.setdefault(name, []).append(time.perf_counter() - began)
        return result

    setattr(owner, name, call)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 seconds")
    arguments = parser.parse_args()
    batch, steps = (4, 12) if arguments.quick else (8, 40)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(SHAPES["10m"], corpus_for_timing(Path(folder)), batch, 256, torch.get_num_threads())
        prepare_process(config, 1)
        corpus = corpus_for_timing(Path(folder))
        run = RunFolder.create(config)
        trainer = Trainer(run, config, corpus, torch.device("cpu"), 0, lambda: False, Heartbeat(run.path / "logs", 0, 1))
        spent: dict[str, list[float]] = {}
        timed(trainer.session.engine, "forward_backward", spent)
        timed(trainer.session.engine, "step", spent)
        timed(trainer, "train_step", spent)
        for step in range(steps + 2):
            trainer.train_step(step)
    rows = zip(spent["train_step"][2:], spent["forward_backward"][2:], spent["step"][2:], strict=True)
    share = [1 - (model + update) / whole for whole, model, update in rows]
    milliseconds = {name: 1e3 * statistics.median(seconds[2:]) for name, seconds in spent.items()}
    table = Table("part of a step", "ms", title=f"10M parameters, {batch} x 256 tokens, median of {steps} steps; the limit is 2%")
    table.add_row("forward and backward", f"{milliseconds['forward_backward']:,.1f}")
    table.add_row("clipping and update", f"{milliseconds['step']:,.1f}")
    table.add_row(
        "everything else", f"{milliseconds['train_step'] * statistics.median(share):,.1f} = {100 * statistics.median(share):.2f}%"
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
