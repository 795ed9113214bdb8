"""Growing a checkpoint by factor 2, beside copying files of the result's size: bandwidth, and the memory that a process takes.

The checkpoint is made up, 6 GB of weights and moments. Memory is what processes hold that is not pages of files, looked at every 20 ms (Linux). The copy and the
growth end with their files synced to the disk.

    python benchmarks/growing.py --quick
    python benchmarks/growing.py --op hyperclone --workers 1
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from regrowth.files import fsync_path
from regrowth.pretrain.checkpoint import CheckpointState, canonical_shapes, has_moments, save_checkpoint
from regrowth.pretrain.growth.grow import grow_checkpoint
from regrowth.pretrain.growth.plan import plan_of
from regrowth.pretrain.lineage import Lineage
from regrowth.pretrain.model_config import ModelConfig


def made_up(path: Path, gigabytes: float) -> int:
    """A checkpoint of about that size; returns its bytes."""
    layers = max(2, round(gigabytes * 24 / 6))
    width = 1024 if gigabytes > 1 else 256
    config = ModelConfig(vocabulary=32_000 if gigabytes > 1 else 4096, width=width, layers=layers, heads=16, kv_heads=16, head_dim=width // 16,
                         ffn_width=4 * width, tied=False)  # fmt: skip
    weights = {name: torch.randn(shape) for name, shape in canonical_shapes(config).items()}
    moments = {f"{name}.{m}": torch.rand(w.shape) for name, w in weights.items() if has_moments(name) for m in ("exp_avg", "exp_avg_sq")}
    save_checkpoint(path, weights, moments, CheckpointState(config, Lineage(), {}, {"step": 0, "optimizer_steps": 1}), alone=True)
    return size_of(path)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Watch(threading.Thread):
    """The largest memory of this process, and of any child."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.own, self.child, self.done = _anonymous(os.getpid()), 0.0, 0.0, False

    def run(self) -> None:
        """Look again and again."""
        while not self.done:
            self.own = max(self.own, _anonymous(os.getpid()) - self.before)
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self.child = max([self.child, *(_anonymous(int(pid)) for pid in children)])
            time.sleep(0.02)


def _anonymous(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) / 2**20  # GiB
    except (OSError, IndexError):
        return 0.0


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files and sync them; the copy is removed."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            fsync_path(path)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 MB")
    parser.add_argument("--op", default="stack")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        made_up(folder / "small", 0.06 if arguments.quick else 6.0)
        small = size_of(folder / "small")
        watch = Watch()
        watch.start()
        began = time.perf_counter()
        grow_checkpoint(folder / "small", folder / "large", plan_of({"op": arguments.op}, "benchmark"), arguments.workers)
        growing = time.perf_counter() - began
        watch.done = True
        watch.join()
        large = size_of(folder / "large")
        copying = min(copy(folder / "large", folder / f"copy{i}") for i in range(2))  # the second has read its source already
    table = Table("what", "measured", "the limit is", title=f"{arguments.op}: {small / 1e9:.2f} GB to {large / 1e9:.2f} GB")
    table.add_row("growing, its source verified first", f"{large / growing / 1e6:,.0f} MB/s", "")
    table.add_row("copying the result, the better of two", f"{large / copying / 1e6:,.0f} MB/s", "")
    table.add_row("growing beside copying", f"{copying / growing:.2f} x as fast", "at least 0.70")
    table.add_row("memory of the process that grows", f"{watch.own:.2f} GiB", "2 GiB")
    table.add_row("largest worker", f"{watch.child:.2f} GiB", "2 GiB")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
