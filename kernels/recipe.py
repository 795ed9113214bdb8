"""Precision recipes: data, not code. For each kind of linear, a quantiser per operand of each of its three GEMMs, and a schedule.

The kinds are `attention` (q, k, v and output projections) and `ffn` (gate, up, down). Embedding, head, norms and the attention core stay in
the training dtype in every recipe.
"""

from dataclasses import dataclass, replace

from regrowth.kernels.quantize import Quantizer

_HIGH = Quantizer(None)


@dataclass(frozen=True)
class GemmPrecision:
    """The two operands of one GEMM."""

    __pydantic_config__ = {"extra": "forbid"}

    a: Quantizer = _HIGH
    b: Quantizer = _HIGH


@dataclass(frozen=True)
class LinearPrecision:
    """y = x w^T (forward: a = x, b = w), dx = dy w (dgrad: a = dy, b = w), dw = dy^T x (wgrad: a = dy, b = x)."""

    __pydantic_config__ = {"extra": "forbid"}

    forward: GemmPrecision = GemmPrecision()
    dgrad: GemmPrecision = GemmPrecision()
    wgrad: GemmPrecision = GemmPrecision()

    @property
    def is_high(self) -> bool:
        """Whether nothing is rounded."""
        return self == LinearPrecision()


@dataclass(frozen=True)
class PrecisionRecipe:
    """What each kind of linear computes in, and when the run returns to full precision."""

    __pydantic_config__ = {"extra": "forbid"}

    name: str = "full"
    attention: LinearPrecision = LinearPrecision()
    ffn: LinearPrecision = LinearPrecision()
    full_precision_last: float = 0.0  # fraction of the steps at the end that run in the training dtype (target-precision schedule)

    def at(self, step: int, steps: int) -> "PrecisionRecipe":
        """The recipe in force at `step` of `steps`: itself, or full precision in the last part."""
        if self.full_precision_last and step >= steps - round(self.full_precision_last * steps):
            return replace(FULL, full_precision_last=self.full_precision_last)
        return self

    @property
    def is_full(self) -> bool:
        """Whether nothing is rounded."""
        return self.attention.is_high and self.ffn.is_high


FULL = PrecisionRecipe()


def _both(quantizer: Quantizer) -> GemmPrecision:
    return GemmPrecision(quantizer, quantizer)


def _fp4_paper(granularity: str, block: int = 128) -> PrecisionRecipe:
    """arXiv 2502.11458: FFN forward FP4, attention projections forward FP8, all linear backward FP8; the end in full precision.

    Scales per token x per channel for small models, per block of 128 for large ones.
    """
    fp4 = Quantizer("e2m1", granularity, block)  # type: ignore[arg-type]
    fp8 = Quantizer("e4m3", granularity, block)  # type: ignore[arg-type]
    backward = {"dgrad": _both(fp8), "wgrad": _both(fp8)}
    return PrecisionRecipe(
        name="fp4_paper" if granularity == "row" else "fp4_paper_block",
        attention=LinearPrecision(forward=_both(fp8), **backward),
        ffn=LinearPrecision(forward=_both(fp4), **backward),
        full_precision_last=0.1,
    )


def _fp8_rowwise() -> PrecisionRecipe:
    """Everything E4M3 with a scale per row: the common FP8 baseline."""
    linear = LinearPrecision(*(_both(Quantizer("e4m3", "row")) for _ in range(3)))
    return PrecisionRecipe(name="fp8_rowwise", attention=linear, ffn=linear)


RECIPES = {recipe.name: recipe for recipe in (FULL, _fp4_paper("row"), _fp4_paper("block"), _fp8_rowwise())}
