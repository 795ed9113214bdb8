"""What a checkpoint written in the background costs the loop: the stall, and the total extra time with slowed steps counted.

The model is a mixture of many experts: large to write (weights and two moments), quick to compute. Steps are timed before a checkpoint, from its
beginning until it stands on disk, and as a peer with a checkpoint written in the foreground, all in one run.

    python benchmarks/checkpoint_stall.py --quick
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from regrowth.parallel.mesh import Mesh
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.background import BackgroundSaver
from regrowth.pretrain.build import build_engine
from regrowth.pretrain.checkpoint import CheckpointState
from regrowth.pretrain.config import OptimizerConfig, RunSettings
from regrowth.pretrain.conformance import Shape, made_up_batch, run_step
from regrowth.pretrain.lineage import Lineage
from regrowth.pretrain.model_config import ModelConfig, MoEConfig
from regrowth.pretrain.session import keep_freed_memory


def model_config(experts: int) -> ModelConfig:
    """Four layers of `experts` experts."""
    moe = MoEConfig(experts=experts, top_k=2, expert_width=512)
    return ModelConfig(vocabulary=4096, width=512, layers=4, heads=8, kv_heads=8, head_dim=64, ffn_width=1024, tied=False, moe=moe)


@dataclass(frozen=True)
class Recipe:
    """What an engine is built from."""

    parallel: ParallelPlan = field(default_factory=lambda: ParallelPlan(micro_batch=8))
    run: RunSettings = field(default_factory=lambda: RunSettings(device="cpu"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loader: Shape = field(default_factory=lambda: Shape(256, 8))


class Loop:
    """Steps that are timed."""

    def __init__(self, config: ModelConfig) -> None:
        recipe = Recipe()
        self.config, self.device = config, torch.device("cpu")
        self.engine = build_engine(recipe, config, Mesh(recipe.parallel, self.device))
        self.batch = made_up_batch(0, config.vocabulary, recipe.loader)
        self.saver = BackgroundSaver(1, 600.0)
        self.engine.moments()

    def step(self) -> float:
        """Seconds of one."""
        began = time.perf_counter()
        run_step(self.engine, self.batch, self.device)
        self.engine.step(1e-4, 1.0)
        return time.perf_counter() - began

    def save(self, path: Path, step: int) -> float:
        """Begin to write; the seconds until the loop may go on."""
        began = time.perf_counter()
        state = CheckpointState(self.config, Lineage(), {}, {"step": step, "optimizer_steps": self.engine.optimizer_steps})
        self.saver.start(path, step, self.engine.weights(), self.engine.moments(), state)
        return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 seconds")
    parser.add_argument(
        "--out", type=Path, help="where checkpoints are written (and removed again); default: the system's temporary folder"
    )
    arguments = parser.parse_args()
    config = model_config(experts=16 if arguments.quick else 48)
    keep_freed_memory()  # as training processes do
    loop = Loop(config)
    steps = 4 if arguments.quick else 12
    usual = statistics.median([loop.step() for _ in range(steps)][1:])
    table = Table("checkpoint", "written in", "stall", "in steps", "steps meanwhile", "total extra time", "in steps")
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        for number, kind in enumerate(("background, the first", "background, later", "foreground")):
            stall, taken = loop.save(Path(folder) / f"step-{number}", number), []
            if kind == "foreground":
                began = time.perf_counter()
                saved = loop.saver.wait()
                stall += time.perf_counter() - began
            else:
                while (saved := loop.saver.finished()) is None:
                    taken.append(loop.step())
            assert saved is not None
            extra = stall + sum(taken) - usual * len(taken)
            table.add_row(kind, f"{saved.write_seconds:.1f} s", f"{stall:.2f} s", f"{stall / usual:.2f}", str(len(taken)), f"{extra:.2f} s", f"{extra / usual:.2f}")  # fmt: skip
    table.title = f"{config.parameters / 1e6:,.0f}M parameters, {12 * config.parameters / 2**30:.1f} GiB of state, a step of {usual:.2f} s; the limit is a stall of one step"
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
