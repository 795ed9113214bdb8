"""Precision recipes: data, not code. For each kind of linear, a quantiser per operand of each of its three GEMMs, what stays wide, and a schedule.

The kinds are `attention` (q, k, v and output projections) and `ffn` (gate, up, down, of experts too). Embedding, head, norms and the attention core stay in
the training dtype in every recipe. `configs/precision/*.toml` are the published ones.
"""

import math
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from regrowth.kernels.quantize import Quantizer

_HIGH = Quantizer(None)


@dataclass(frozen=True)
class GemmPrecision:
    """The two operands of one GEMM."""

    __pydantic_config__ = {"extra": "forbid"}

    a: Quantizer = _HIGH
    b: Quantizer = _HIGH
    hadamard: Literal[0, 16, 32, 64, 128] = 0  # both operands are transformed in blocks of so many along what is contracted; 0: not at all
    # Of the transform: "none"; "fixed", one vector for all linears and steps; "random", drawn for each linear and step.
    signs: Literal["none", "fixed", "random"] = "none"

    @property
    def is_high(self) -> bool:
        """Whether nothing is rounded, and so nothing transformed."""
        return self.a.format is None and self.b.format is None

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return not self.is_high and (self.signs == "random" or "stochastic" in (self.a.rounding, self.b.rounding))


@dataclass(frozen=True)
class LinearPrecision:
    """y = x w^T (forward: a = x, b = w), dx = dy w (dgrad: a = dy, b = w), dw = dy^T x (wgrad: a = dy, b = x)."""

    __pydantic_config__ = {"extra": "forbid"}

    forward: GemmPrecision = GemmPrecision()
    dgrad: GemmPrecision = GemmPrecision()
    wgrad: GemmPrecision = GemmPrecision()
    # How gradients pass the rounding of the forward pass. "straight": as if it were not there, from the operands as they were. "dge": the weight's gradient times the derivative
    # of a smooth stand-in for its rounding (arXiv 2501.17116). "trust": from the operands as they were rounded, and none where a value was clipped (arXiv 2505.14669).
    estimator: Literal["straight", "dge", "trust"] = "straight"

    def __post_init__(self) -> None:
        if self.estimator == "dge" and self.forward.b.format is None:
            raise ValueError('estimator = "dge" stands for the rounding of the weight; give forward.b a format')
        if self.estimator == "dge" and (self.forward.hadamard or self.forward.b.scale == "delayed"):
            raise ValueError(
                'estimator = "dge" is of the weight as it is and of its own scale; leave forward.hadamard and scale = "delayed" out of it'
            )
        if self.estimator == "trust" and {self.forward.a.scale, self.forward.b.scale} != {"rms"}:
            raise ValueError('estimator = "trust" is about what scale = "rms" clips; give it to forward.a and forward.b')
        if self.estimator == "trust" and (self.forward.a.outliers or self.forward.b.outliers):
            raise ValueError(
                'estimator = "trust" leaves out what was clipped, outliers keep it; leave forward.a.outliers and forward.b.outliers out of it'
            )
        if self.estimator == "trust" and (self.forward.a.format is None or self.forward.b.format is None or self.forward.draws):
            raise ValueError(
                'estimator = "trust" takes the rounded operands of the forward pass; give forward.a and forward.b formats, and leave chance out of it'
            )

    @property
    def is_high(self) -> bool:
        """Whether nothing is rounded."""
        return self.forward.is_high and self.dgrad.is_high and self.wgrad.is_high

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.forward.draws or self.dgrad.draws or self.wgrad.draws


HIGH = LinearPrecision()


@dataclass(frozen=True)
class Fallback:
    """When a linear that loses too much by rounding goes wide, for the rest of the run: its relative error |Q(x) - x| / |x| is measured every so many steps."""

    __pydantic_config__ = {"extra": "forbid"}

    every: int = 100
    error: float = math.inf  # the most for activations and weights
    gradient_error: float = math.inf  # the most for gradients; 0.1 is a signal 20 dB above the noise

    def __post_init__(self) -> None:
        if self.every < 1 or self.error <= 0 or self.gradient_error <= 0:
            raise ValueError("fallback: `every` is at least 1, and limits are above 0")

    def exceeded(self, errors: dict[str, float]) -> bool:
        """Whether a linear's errors, by operand, are too large."""
        gradients = ("dgrad.a", "wgrad.a")
        return any(error > (self.gradient_error if operand in gradients else self.error) for operand, error in errors.items())


@dataclass(frozen=True)
class PrecisionRecipe:
    """What each kind of linear computes in, which stay wide, and when the run returns to full precision."""

    __pydantic_config__ = {"extra": "forbid"}

    name: str = "full"
    attention: LinearPrecision = HIGH
    ffn: LinearPrecision = HIGH
    first_wide: int | float = 0  # blocks at the beginning of the model that stay wide: a number, or (with a decimal point) a share of all
    last_wide: int | float = 0
    wide: tuple[str, ...] = ()  # further linears that stay wide, as patterns of their names: "layers.3.attn.*", "*.w_down"
    full_precision_last: float = 0.0  # share of the steps, the last, that run in the training dtype (target-precision schedule)
    last_switch: Literal["all", "forward"] = "all"  # what of it goes wide then: everything, or the forward pass alone
    fallback: Fallback | None = None  # None: errors are not measured

    def __post_init__(self) -> None:
        for key, value in (("first_wide", self.first_wide), ("last_wide", self.last_wide)):
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise ValueError(f"{key} = {value} is neither a number of blocks (a whole one) nor a share of them (below 1)")
        if not 0 <= self.full_precision_last <= 1:
            raise ValueError(f"full_precision_last = {self.full_precision_last} is no share of the steps, between 0 and 1")

    def at(self, step: int, steps: int) -> "PrecisionRecipe":
        """The recipe in force at `step` of `steps`: itself, or what it becomes in the last part."""
        if not self.full_precision_last or step < steps - round(self.full_precision_last * steps):
            return self
        if self.last_switch == "all":
            return replace(FULL, full_precision_last=self.full_precision_last)
        attention, ffn = (replace(kind, forward=GemmPrecision(), estimator="straight") for kind in (self.attention, self.ffn))
        return replace(self, name=f"{self.name}, forward full", attention=attention, ffn=ffn)

    @property
    def is_full(self) -> bool:
        """Whether nothing is rounded."""
        return self.attention.is_high and self.ffn.is_high

    @property
    def history(self) -> int:
        """Steps that delayed scales look back on; 0 without them."""
        gemms = [gemm for kind in (self.attention, self.ffn) for gemm in (kind.forward, kind.dgrad, kind.wgrad)]
        return max((q.history for gemm in gemms for q in (gemm.a, gemm.b) if q.format and q.scale == "delayed"), default=0)

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.attention.draws or self.ffn.draws

    def in_wide_block(self, layer: int, layers: int) -> bool:
        """Whether a layer of so many is among the first or the last ones that stay wide."""
        first, last = (round(n * layers) if isinstance(n, float) else n for n in (self.first_wide, self.last_wide))
        return not first <= layer < layers - last

    def of(self, name: str, kind: str, layers: int) -> LinearPrecision:
        """What the linear of a name (`layers.3.ffn.w_up`) computes in, in a model of so many layers."""
        block = re.match(r"layers\.(\d+)\.", name)
        if block and self.in_wide_block(int(block[1]), layers):
            return HIGH
        if any(fnmatchcase(name, pattern) for pattern in self.wide):
            return HIGH
        return self.ffn if kind == "ffn" else self.attention


FULL = PrecisionRecipe()
