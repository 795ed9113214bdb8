"""Quantise kernels on a GPU, beside the bandwidth of a copy on it and beside torchao's kernels for the same formats.

A kernel moves at least what it has to: each input read once, each output written once. Its share is how fast it moves that, over how fast a copy moves as many bytes. Inputs and
outputs go round through more memory than the cache holds; calls are recorded as a CUDA graph, so that Python's time is in no figure; every figure is the median of many replays.
A kernel whose scales need the whole tensor first (rows, two levels) reads its input twice, and its share is of one reading all the same.

    python benchmarks/kernels.py --quick
"""

import argparse
import functools
import importlib
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from regrowth.errors import UserError, need
from regrowth.files import write_json
from regrowth.kernels.packed import Packed
from regrowth.kernels.quantize import Quantizer

SHAPES = [(4096, 4096), (8192, 8192), (16384, 4096), (16384, 14336)]
QUICK = [(4096, 4096), (8192, 8192)]


class Case(NamedTuple):
    """A kernel of ours, of some inputs, and torchao's that does the same, where it has one."""

    name: str
    call: Callable[..., Any]
    inputs: int = 1
    peer: Callable[..., Any] | None = None


def cases() -> Iterator[Case]:
    """Every kernel with the formats in use: MXFP8, FP8 by blocks and tiles of 128, FP8 by rows, MXFP4, NVFP4; bf16 comes in."""
    from regrowth.kernels.triton_dequantize import dequantize
    from regrowth.kernels.triton_fused import rms_norm_quantize, swiglu_quantize
    from regrowth.kernels.triton_quantize import Operand, quantize_both, quantize_columns, quantize_rows

    mx = "torchao.prototype.mx_formats.kernels"
    rows, columns = torchao(mx, "triton_to_mxfp8_dim0"), torchao(mx, "triton_to_mxfp8_dim1")
    blocks = torchao("torchao.prototype.blockwise_fp8_training.kernels", "triton_fp8_blockwise_act_quant_lhs")
    tiles = torchao("torchao.kernel.blockwise_quantization", "fp8_blockwise_weight_quant")
    mxfp8, mxfp4 = Quantizer("e4m3", "block", 32, "floor"), Quantizer("e2m1", "block", 32, "floor", shrink=0.75)
    nvfp4, fp8 = Quantizer("e2m1", "block", 16, "two_level"), Quantizer("e4m3", "block", 128)
    by_rows, tile = Quantizer("e4m3"), Quantizer("e4m3", "tile", 128)
    chance = Operand(Quantizer("e2m1", "block", 32, "floor", "stochastic", 0.75), 32, key=1)
    yield Case("MXFP8, rows", lambda x: quantize_rows(x, mxfp8), peer=rows and (lambda x: rows(x, 32, "floor")))
    yield Case("MXFP8, columns", lambda x: quantize_columns(x, mxfp8), peer=columns and (lambda x: columns(x, 32, "floor")))
    both = (lambda x: (rows(x, 32, "floor"), columns(x, 32, "floor"))) if rows and columns else None
    yield Case("MXFP8, both", lambda x: quantize_both(x, mxfp8, mxfp8), peer=both)
    yield Case("FP8 by blocks of 128, rows", lambda x: quantize_rows(x, fp8), peer=blocks and (lambda x: blocks(x, 128)))
    yield Case("FP8 by tiles of 128", lambda x: quantize_rows(x, tile), peer=tiles and (lambda x: tiles(x, 128)))
    yield Case("FP8 by rows", lambda x: quantize_rows(x, by_rows))
    yield Case("FP8 by rows, both", lambda x: quantize_both(x, by_rows, by_rows))
    yield Case("MXFP4, rows", lambda x: quantize_rows(x, mxfp4))
    yield Case("MXFP4 by chance after Hadamard, both", lambda x: quantize_both(x, chance, chance))
    yield Case("NVFP4, rows", lambda x: quantize_rows(x, nvfp4))
    yield Case("NVFP4, both", lambda x: quantize_both(x, nvfp4, nvfp4))
    yield Case("SwiGLU to MXFP8", lambda gate, up: swiglu_quantize(gate, up, mxfp8), inputs=2)
    weight = functools.cache(lambda width: torch.ones(width, device="cuda"))
    yield Case("RMSNorm to MXFP8", lambda x: rms_norm_quantize(x, weight(x.shape[1]), 1e-6, mxfp8))
    yield Case("MXFP8 to bf16", _Back(lambda x: quantize_rows(x, mxfp8), lambda packed: dequantize(packed, torch.bfloat16)))


class _Back:
    """Turns quantised inputs back: what is quantised is made outside of what is timed."""

    def __init__(self, prepare: Callable[[torch.Tensor], Packed], call: Callable[[Packed], torch.Tensor]) -> None:
        self.prepare, self.call = prepare, call

    def __call__(self, packed: Packed) -> torch.Tensor:
        return self.call(packed)


def torchao(module: str, name: str) -> Callable[..., Any] | None:
    """A kernel of torchao's, or None where it is not installed or has none such."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError):
        return None


def size_of(value: Any) -> int:
    """Bytes of all tensors in a result or an input."""
    if isinstance(value, Packed):
        value = (value.codes, value.scales, value.whole)
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(size_of(part) for part in value) if isinstance(value, tuple | list) else 0


def seconds_of(call: Callable[..., Any], inputs: list[tuple[Any, ...]], replays: int) -> float:
    """Median seconds of one call, over replays of a graph that goes round through all inputs and keeps every output."""
    for _ in range(3):  # compiles and tunes
        call(*inputs[0])
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for one in inputs:
            kept.append(call(*one))  # noqa: PERF401
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(inputs))
    return statistics.median(times)


def measure(case: Case, shape: tuple[int, int], replays: int) -> dict[str, Any]:
    """Seconds of a case, of a copy of as many bytes, and of the peer, for bf16 inputs of a shape."""
    made = tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(case.inputs))
    ready: tuple[Any, ...] = (case.call.prepare(*made),) if isinstance(case.call, _Back) else made
    bytes_ = size_of(ready) + size_of(case.call(*ready))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    rounds = max(4, -(-3 * cache // bytes_))
    inputs = [ready] + [tuple(_again(value) for value in ready) for _ in range(rounds - 1)]
    ours = seconds_of(case.call, inputs, replays)
    peer = None
    if case.peer is not None:
        try:
            peer = seconds_of(case.peer, inputs, replays)
        except Exception as error:  # a peer that does not run on this GPU is told of, and is no reason to end
            print(f"torchao's kernel for {case.name} does not run here: {error}", file=sys.stderr)
    pairs = [tuple(torch.empty(bytes_ // 2, dtype=torch.uint8, device="cuda") for _ in range(2)) for _ in range(rounds)]
    copy = seconds_of(lambda source, target: target.copy_(source), pairs, replays)
    return {
        "kernel": case.name,
        "shape": list(shape),
        "bytes": bytes_,
        "seconds": ours,
        "copy_bytes_per_second": bytes_ // 2 * 2 / copy,
        "share_of_copy": bytes_ / ours / (bytes_ // 2 * 2 / copy),
        "torchao_seconds": peer,
    }


def _again(value: Any) -> Any:
    if isinstance(value, Packed):
        return Packed(value.codes.clone(), value.scales.clone(), value.whole, value.shape, value.quantizer)
    return value.clone()


def main() -> None:
    """Print the table, and write what it was made of where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer replays")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures, with hardware, date and command")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py needs a GPU: it times Triton kernels, and under the interpreter their times mean nothing.",
            file=sys.stderr,
        )
        sys.exit(UserError.exit_code)
    triton = need("triton", "timing kernels")
    shapes, replays = (QUICK, 20) if arguments.quick else (SHAPES, 100)
    rows = [measure(case, shape, replays) for shape in shapes for case in cases()]
    device = torch.cuda.get_device_name()
    title = f"{device}, torch {torch.__version__}, triton {triton.__version__}, bf16 in, median of {replays}"
    table = Table("kernel", "shape", "microseconds", "GB/s", "of a copy's", "beside torchao", title=title)
    for row in rows:
        beside = f"{row['torchao_seconds'] / row['seconds']:.2f} x as fast" if row["torchao_seconds"] else ""
        m, k = row["shape"]
        rate = f"{row['bytes'] / row['seconds'] / 1e9:,.0f}"
        table.add_row(row["kernel"], f"{m} x {k}", f"{row['seconds'] * 1e6:,.1f}", rate, f"{row['share_of_copy']:.0%}", beside)
    Console(width=130).print(table)
    if arguments.out:
        versions = {
            name: importlib.import_module(name).__version__ for name in ("torch", "triton", "torchao") if torchao(name, "__version__")
        }
        told = {
            "hardware": device,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            **versions,
        }
        write_json(arguments.out, {**told, "replays": replays, "results": rows})


if __name__ == "__main__":
    main()
