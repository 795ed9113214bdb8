"""Where a run's numbers go: `metrics.jsonl` and `mixing.jsonl` always, TensorBoard when it is installed."""

import math
import resource
from typing import Any

import torch

from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder

# Dense bf16 matrix TFLOP/s of one device, from the vendors' data sheets; the Frontier figure is one GCD of an MI250X.
_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0, "MI250X": 191.5, "MI300X": 1307.0}


def peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """The peak that MFU is measured against; None where nobody knows it (CPUs, fp32 on GPUs)."""
    if config.run.peak_tflops:
        return config.run.peak_tflops
    if device.type != "cuda" or config.run.dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def model_flops_utilization(flops_per_second: float, config: RunConfig, device: torch.device) -> float | None:
    """Share of the peak of all devices; full attention counted."""
    peak = peak_tflops(config, device)
    return None if peak is None else flops_per_second / (peak * 1e12 * config.parallel.world_size)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: allocated on its GPU, or resident in its process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """Rank 0's writer."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        try:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board: Any = SummaryWriter(str(run.path / "tensorboard"))
        except ImportError:
            self.board = None

    def step(self, row: dict[str, Any], decision: dict[str, Any]) -> None:
        """One training step and its mixing decision. Numbers that are not finite are written as null."""
        self.run.log("metrics", _jsonable(row))
        self.run.log("mixing", _jsonable(decision))
        if self.board:
            for key in ("loss", "lr", "grad_norm", "tokens_per_second"):
                self.board.add_scalar(f"train/{key}", row[key], row["step"])
            for domain, share in row["mixture"].items():
                self.board.add_scalar(f"mixture/{domain}", share, row["step"])

    def evaluation(self, row: dict[str, Any]) -> None:
        """One evaluation."""
        if self.board:
            for domain, score in row["domains"].items():
                self.board.add_scalar(f"bits_per_byte/{domain}", score["bits_per_byte"], row["step"])

    def close(self) -> None:
        """Flush."""
        if self.board:
            self.board.close()


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_jsonable(inner) for inner in value]
    return value
