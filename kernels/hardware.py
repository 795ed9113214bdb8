"""Products of eight-bit operands by the device's matrix units (`torch._scaled_mm`): the same roundings as emulation, so the same product within the order of its sums.

Whether they pay is measured: on one H100, FP8 gains above about a billion parameters and loses below.
"""

import statistics
import time

import torch

from regrowth.kernels.recipe import GemmPrecision, LinearPrecision

TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
MULTIPLE = 16  # of which matrix units want what is contracted


def lacks(device: torch.device) -> str:
    """Why a device has no such products; empty if it has."""
    if device.type != "cuda":
        return f"a {device.type.upper()} has no matrix units for eight bits"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        ""
        if (major, minor) >= (8, 9)
        else f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has none for eight bits; sm_89 and later have"
    )


def takes(gemm: GemmPrecision) -> bool:
    """Whether matrix units take a product's operands: eight bits, not E5M2 twice, scales of tensors or of rows, and nothing kept wide beside them."""
    a, b = gemm.a, gemm.b
    plain = all(q.format in TYPES and q.scale in ("full", "delayed") and q.shrink == 1.0 and q.outliers is None for q in (a, b))
    return plain and a.granularity == b.granularity and a.granularity in ("tensor", "row") and not a.format == b.format == "e5m2"


def takes_linear(precision: LinearPrecision, out_features: int, in_features: int, tokens: int) -> bool:
    """Whether matrix units take all of a linear's products that are narrow. One of which a part would have to be emulated is emulated as a whole: it shows what its recipe does,
    and is not to go wide for being slow."""
    narrow = [gemm for gemm in (precision.forward, precision.dgrad, precision.wgrad) if not gemm.is_high]
    fits = not any(size % MULTIPLE for size in (out_features, in_features, tokens))  # each is contracted by one of the products
    return bool(narrow) and all(map(takes, narrow)) and precision.estimator == "straight" and fits


def product(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a [..., k] times b [n, k] transposed: [..., n] in `dtype`, summed in fp32.

    Args:
        a: of an eight-bit type, as b.
        a_scale: fp32, one, or [..., 1]: one for each row.
    """
    rows = a.reshape(-1, a.shape[-1])
    if a_scale.numel() == 1 and b_scale.numel() == 1:
        scales = a_scale.reshape(()), b_scale.reshape(())
    else:
        scales = a_scale.flatten()[:, None], b_scale.flatten()[None]
    out = torch._scaled_mm(rows.contiguous(), b.contiguous().t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype)
    return out.view(*a.shape[:-1], len(b))


def gain(tokens: int, out_features: int, in_features: int, precision: LinearPrecision, device: torch.device, repeats: int = 10) -> float:
    """How many times as fast a linear is by matrix units as wide, forward and backward in bf16 together; median of several."""
    from regrowth.kernels.linear import LowPrecisionLinear
    from regrowth.kernels.recipe import HIGH

    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16, requires_grad=True)
    linear = LowPrecisionLinear(in_features, out_features).to(device, torch.bfloat16)
    linear.hardware = True
    gradient = torch.randn(tokens, out_features, device=device, dtype=torch.bfloat16)

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        linear(x).backward(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    times: dict[LinearPrecision, list[float]] = {HIGH: [], precision: []}
    for _ in range(repeats + 2):  # in turns; the first two warm up
        for linear.precision, taken in times.items():
            taken.append(seconds())
    wide, narrow = (statistics.median(taken[2:]) for taken in times.values())
    return wide / narrow
