"""Emulation by the Triton kernels on a GPU: to codes and back in two passes, instead of a pass for each of the reference's operators.

A kernel is used where, on the very device, it gives the reference's bits and takes less time; that is found out when a quantiser is first met. So it changes no result. Ranks that share scales keep
to the reference: each of them decides by its own clock, and the two ways exchange the largest values at different points.
"""

import importlib.util
import logging
import time
from collections.abc import Callable
from functools import cache

import torch

from regrowth.kernels.hadamard import hadamard, random_signs
from regrowth.kernels.quantize import AmaxGroups, Quantizer
from regrowth.kernels.random import Stream

_log = logging.getLogger(__name__)
_SHAPE = (1024, 2048)  # of the trial
_REPEATS = 10


def takes(x: torch.Tensor, quantizer: Quantizer, size: int, groups: AmaxGroups, transposed: bool, dtype: torch.dtype) -> bool:
    """Whether the kernels round this operand here: a GPU's, not inside a compiled block, by a rule that they have, and with gain.

    Args:
        size: of the Hadamard transform before it; 0 for none.
        transposed, dtype: as of `emulate`.
    """
    if groups.row is not None or groups.tensor is not None or not x.numel() or torch.compiler.is_compiling() or not _are_there(x.device):
        return False
    known = quantizer.format is not None and quantizer.outliers is None and quantizer.scale != "delayed"
    if not known or x.shape[-1] % 2 or (quantizer.granularity in ("block", "tile") and quantizer.block & (quantizer.block - 1)):
        return False
    return _gains(quantizer, size, transposed, x.dtype, dtype, x.device)


def emulate(
    x: torch.Tensor,
    quantizer: Quantizer,
    size: int = 0,
    signs: torch.Tensor | None = None,
    stream: Stream | None = None,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`quantizer.emulate(hadamard(x, size, signs))`, rounded to `dtype`.

    Args:
        x: [..., n] fp32, bf16 or fp16.
        stream: what stochastic rounding draws from; of x's transpose, if `transposed`.
        transposed: whether x [m, n] is the transpose of what is in memory.
    """
    from regrowth.kernels.triton_dequantize import dequantize
    from regrowth.kernels.triton_quantize import Operand, Place, quantize_columns, quantize_rows

    operand = Operand(quantizer, size or None, signs, stream.key if stream else None)
    place = Place(stream.rows, stream.whole, stream.first) if stream else None
    packed = quantize_columns(x.t(), operand, place) if transposed else quantize_rows(x.reshape(-1, x.shape[-1]), operand, place)
    return dequantize(packed, dtype).view(x.shape)


def _are_there(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@cache
def _gains(quantizer: Quantizer, size: int, transposed: bool, of: torch.dtype, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels give the reference's bits, and sooner, on a made-up operand of which a few values are far out; the very call that is to be made."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(_SHAPE, generator=generator, device=device)
    x[::7, ::13] *= 40
    x = x.to(of)
    operand = x.t() if transposed else x
    signs = random_signs(size, 1, device) if size else None
    stream = Stream(2, torch.arange(len(x), device=device), x.shape[1]) if quantizer.rounding == "stochastic" else None

    def reference() -> torch.Tensor:
        turned = hadamard(operand, size, signs) if size else operand
        bits = stream.bits(x.shape[1]) if stream else None
        return quantizer.emulate(turned, random=bits.t() if bits is not None and transposed else bits).to(dtype)

    def kernels() -> torch.Tensor:
        return emulate(operand, quantizer, size, signs, stream, transposed, dtype)

    try:
        if not torch.equal(reference(), kernels()):
            _log.warning("the Triton kernels round otherwise than the reference here, and are not used: %s", quantizer)
            return False
    except Exception as error:  # whatever a compiler says that has never seen this device: the reference goes on
        _log.warning("the Triton kernels do not run here, and are not used: %s: %s", type(error).__name__, error)
        return False
    return _seconds(kernels, device) < _seconds(reference, device)


def _seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    run()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin
