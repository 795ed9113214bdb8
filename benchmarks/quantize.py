"""The reference quantisers beside torchao's on the CPU, and emulated recipes beside fp32, a linear and a whole training step; every figure a ratio within one run.

Both sides of a pair take turns, and a ratio is the median over the turns: other programs on the machine then slow both. "Quantise" ends with values and
scales (torchao's values packed as codes, ours in fp32, which the emulation multiplies); "and back" scales them back to fp32. A step is of four
Llama-shaped layers of width d: forward, backward, clipping, AdamW. Bars: at least as fast as torchao; a step under any recipe at most 3 times the fp32 step.

    python benchmarks/quantize.py --quick
    python benchmarks/quantize.py --out quantize.json
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from regrowth.kernels.linear import low_precision_linear
from regrowth.kernels.quantize import Quantizer
from regrowth.pretrain.build import build_model
from regrowth.pretrain.conformance import Shape, made_up_batch
from regrowth.pretrain.initialise import initialise
from regrowth.pretrain.loss import to_tensors
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.precision import load_recipe, shipped

LIMIT = 3.0  # times the fp32 step
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def seconds_of_turns(first: Callable[[], Any], second: Callable[[], Any], turns: int) -> list[tuple[float, float]]:
    """Seconds of both in each turn, after two for warming up; who begins alternates."""
    taken = []
    for turn in range(turns + 2):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            run = (first, second)[which]
            began = time.perf_counter()
            run()
            seconds[which] = time.perf_counter() - began
        taken.append((seconds[0], seconds[1]))
    return taken[2:]


def quantisers(x: torch.Tensor) -> dict[str, tuple[Pair, Pair]]:
    """By rule: (ours, torchao's) for quantising, and for quantising and back.

    Args:
        x: [rows, n] fp32.
    """
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def mx(dtype: torch.dtype) -> Any:
        return MXTensor.to_mx(x, dtype, 32)

    def nvfp4() -> Any:
        return NVFP4Tensor.to_nvfp4(x, 16, per_tensor_amax_to_scale(x.abs().max()))

    def tensorwise() -> Any:
        return hp_tensor_to_float8_dynamic(x, torch.float8_e4m3fn, LinearMMConfig())

    def rowwise() -> Any:
        along: Any = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1}
        return hp_tensor_to_float8_dynamic(x, torch.float8_e4m3fn, LinearMMConfig(), **along)

    def pairs(ours: Quantizer, theirs: Callable[[], Any], back: Callable[[Any], Any]) -> tuple[Pair, Pair]:
        return (lambda: ours.quantize(x), theirs), (lambda: ours.emulate(x), lambda: back(theirs()))

    def dequantize(got: Any) -> torch.Tensor:
        return got.dequantize()

    def to_fp32(got: Any) -> torch.Tensor:
        return got.to_original_precision()

    return {
        "MXFP4, blocks of 32, floor": pairs(Quantizer("e2m1", "block", 32, "floor"), lambda: mx(torch.float4_e2m1fn_x2), dequantize),
        "MXFP8 E4M3, blocks of 32, floor": pairs(Quantizer("e4m3", "block", 32, "floor"), lambda: mx(torch.float8_e4m3fn), dequantize),
        "NVFP4, blocks of 16, two levels": pairs(Quantizer("e2m1", "block", 16, "two_level"), nvfp4, dequantize),
        "E4M3, a scale per row": pairs(Quantizer("e4m3", "row"), rowwise, to_fp32),
        "E4M3, a scale per tensor": pairs(Quantizer("e4m3", "tensor"), tensorwise, to_fp32),
    }


def linears(tokens: int, width: int) -> dict[str, Pair]:
    """By recipe and kind of linear: (emulated, plain fp32), forward and both gradients of [tokens, width] times [width, width]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(width, width, generator=generator).div_(width**0.5).requires_grad_()
    gradient = torch.randn(tokens, width, generator=generator)

    def run(linear: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            torch.autograd.grad(linear(), (x, weight), gradient)

        return step

    def emulated(precision: Any) -> Callable[[], torch.Tensor]:
        return lambda: low_precision_linear(x, weight, precision)

    plain = run(lambda: torch.nn.functional.linear(x, weight))
    found = {}
    for name in shipped():
        recipe = load_recipe(name)
        kinds = {"": recipe.ffn} if recipe.attention == recipe.ffn else {", attention": recipe.attention, ", ffn": recipe.ffn}
        for kind, precision in kinds.items():
            if not precision.is_high:
                found[name + kind] = run(emulated(precision)), plain
    return found


def steps(tokens: int, width: int) -> dict[str, Pair]:
    """By recipe: (a training step under it, the fp32 step) of one model, on sequences of at most 512 tokens."""
    length = min(512, tokens)
    heads = width // 64
    config = ModelConfig(vocabulary=4096, width=width, layers=4, heads=heads, kv_heads=heads, head_dim=64, ffn_width=11 * width // 4)
    model = build_model(config, torch.device("cpu")).to_empty(device="cpu")
    initialise(dict(model.named_parameters()), config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = to_tensors(made_up_batch(0, config.vocabulary, Shape(length, tokens // length)), torch.device("cpu"))
    count = iter(range(1 << 30))

    def under(name: str) -> Callable[[], None]:
        recipe = load_recipe(name)

        def step() -> None:
            model.follow(recipe, 0, next(count))
            losses = model(batch["tokens"], batch["positions"], batch["doc_ids"], batch["labels"], batch["loss_weight"])[0]
            (losses.sum() / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {name: (under(name), under("full")) for name in shipped() if not load_recipe(name).is_full}


def beside_fp32(console: Console, title: str, pairs: dict[str, Pair], turns: int) -> dict[str, Any]:
    """Time them, and print a row for each."""
    table, figures = Table("recipe", "ms", "fp32, ms", "times fp32", title=title), {}
    for name, pair in pairs.items():
        taken = seconds_of_turns(*pair, turns)
        ours, plain = (1e3 * statistics.median(column) for column in zip(*taken, strict=True))
        ratio = statistics.median(a / b for a, b in taken)
        figures[name] = {"ms": ours, "fp32_ms": plain, "times_fp32": ratio}
        table.add_row(name, f"{ours:.1f}", f"{plain:.1f}", f"{ratio:.2f}")
    console.print(table)
    return figures


def main() -> None:
    """Print the tables; write them as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute or two")
    parser.add_argument("--rows", type=int, default=2048, help="tokens")
    parser.add_argument("--width", type=int, default=512, help="d of the linear, and values in a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    turns = 15 if arguments.quick else 101
    shape = f"{arguments.rows} x {arguments.width}"
    figures: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "shape": [arguments.rows, arguments.width],
        "threads": arguments.threads,
        "turns": turns,
        "quantisers": {},
    }
    console = Console(width=120)
    if importlib.util.find_spec("torchao"):
        x = torch.randn(arguments.rows, arguments.width, generator=torch.Generator().manual_seed(0))
        table = Table("rule", "ms", "torchao, ms", "quantise: regrowth is", "and back: regrowth is",
                      title=f"quantisers, {shape}, fp32, {arguments.threads} threads, median of {turns}; at least as fast is the aim")  # fmt: skip
        for name, (there, and_back) in quantisers(x).items():
            taken, both = seconds_of_turns(*there, turns), seconds_of_turns(*and_back, turns)
            ours, theirs = (1e3 * statistics.median(column) for column in zip(*taken, strict=True))
            ratio, back = (statistics.median(b / a for a, b in rows) for rows in (taken, both))
            figures["quantisers"][name] = {"ms": ours, "torchao_ms": theirs, "times_as_fast": ratio, "and_back_times_as_fast": back}
            table.add_row(name, f"{ours:.2f}", f"{theirs:.2f}", f"{ratio:.2f} x as fast", f"{back:.2f} x as fast")
        console.print(table)
    else:
        console.print("quantisers skipped: torchao is not installed (pip install 'regrowth[gpu]')")
    what = f"{arguments.rows} tokens, fp32, {arguments.threads} threads"
    figures["linears"] = beside_fp32(
        console,
        f"emulated linear {arguments.width} -> {arguments.width}, {what}, forward and backward",
        linears(arguments.rows, arguments.width),
        turns,
    )
    title = f"training step, four layers of width {arguments.width}, {what}; the limit is {LIMIT:g}"
    figures["steps"] = beside_fp32(console, title, steps(arguments.rows, arguments.width), 1 if arguments.quick else 11)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
