"""One application of a low-precision linear: which slice of which weight it is, at which step, and its operands rounded as a recipe says."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from regrowth.kernels import emulation, hardware
from regrowth.kernels.formats import Format
from regrowth.kernels.hadamard import hadamard, inverse_hadamard, random_signs
from regrowth.kernels.quantize import AmaxGroups, Quantizer
from regrowth.kernels.random import Stream, random_key
from regrowth.kernels.recipe import GemmPrecision, LinearPrecision
from regrowth.kernels.tables import AmaxHistory, RoundingErrors

Gemm = Literal["forward", "dgrad", "wgrad"]
Side = Literal["a", "b"]
_WHOLE = AmaxGroups()


@dataclass(frozen=True)
class Cut:
    """How a linear is split over ranks: which ranks cut the dim that each of the three GEMMs contracts, and which slice of the weight is here."""

    forward: AmaxGroups = _WHOLE
    dgrad: AmaxGroups = _WHOLE
    wgrad: AmaxGroups = _WHOLE
    rank: int = 0
    ranks: int = 1
    along_out: bool = True  # which dim of the weight [out, in] is cut


@dataclass
class Site:
    """Which linear this is, and when: what chance depends on, and where scales are remembered."""

    name: str = ""
    part: int = 0  # which matrix of a stack
    seed: int = 0
    step: int = 0
    tokens: torch.Tensor | None = (
        None  # int64, one number per row of the input that is the same under every split; needed where a recipe draws
    )
    history: AmaxHistory | None = None
    errors: RoundingErrors | None = None  # where this step's errors are written down

    @property
    def remembers(self) -> bool:
        """Whether anything is written down here."""
        return self.history is not None or self.errors is not None

    def now(self) -> "Site":
        """As it is at this call: the backward pass comes when the next one has begun."""
        return replace(self)


@dataclass(frozen=True)
class Rounded:
    """An operand as a GEMM takes it: transformed and rounded; and where it was not clipped, if that was asked for."""

    value: torch.Tensor
    kept: torch.Tensor | None = None
    scale: torch.Tensor | None = None  # of a value of an eight-bit type, which matrix units multiply


@dataclass(frozen=True)
class Call:
    """One application of a linear."""

    precision: LinearPrecision
    cut: Cut = Cut()
    site: Site | None = None  # None where the recipe neither draws nor remembers
    training: bool = True
    hardware: bool = False  # products that matrix units take are theirs
    weight_amax: torch.Tensor | None = None  # of the whole weight, where it is known: fp32, for scales of tensors

    def product(self, a: Rounded, b: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """a [..., k] times b [n, k] transposed, in `dtype`."""
        if a.scale is not None and b.scale is not None:
            return hardware.product(a.value, a.scale, b.value, b.scale, dtype)
        return a.value.to(dtype) @ b.value.to(dtype).t()

    def operand(
        self,
        gemm: Gemm,
        side: Side,
        x: torch.Tensor,
        of: Literal["x", "dy", "w"],
        dtype: torch.dtype,
        transposed: bool = False,
        mask: bool = False,
    ) -> Rounded:
        """An operand of a GEMM, rounded; the dim that is contracted is the last of x.

        Args:
            of: what it is: the input [rows, in], the output's gradient [rows, out], the weight [out, in].
            dtype: that it will be multiplied in.
            transposed: whether x is the transpose of that.
            mask: whether `kept` is wanted.
        """
        entry: GemmPrecision = getattr(self.precision, gemm)
        quantizer: Quantizer = getattr(entry, side)
        if entry.is_high:
            return Rounded(x)
        groups: AmaxGroups = getattr(self.cut, gemm)
        site, signs = self.site, self._signs(gemm, x.device) if entry.hadamard else None
        errors = site.errors if site is not None and self.training else None
        stream = self._stream(gemm, side, x, of, transposed) if quantizer.rounding == "stochastic" else None
        taken = self.hardware and x.numel() > 0 and x.shape[-1] % hardware.MULTIPLE == 0 and hardware.takes(entry)
        known = self.weight_amax if of == "w" else None
        if not (taken or mask or errors or known is not None) and emulation.takes(x, quantizer, entry.hadamard, groups, transposed, dtype):
            return Rounded(emulation.emulate(x, quantizer, entry.hadamard, signs, stream, transposed, dtype))
        if entry.hadamard:
            x = hadamard(x, entry.hadamard, signs)
        if quantizer.format is None:
            return Rounded(x)
        random, amax = None, known
        if stream is not None:
            random = stream.bits(len(x)).t() if transposed else stream.bits(x.shape[-1]).reshape(x.shape)
        if quantizer.scale == "delayed" and site is not None and site.history is not None:
            amax = site.history.amax(site.name, f"{gemm}.{side}", quantizer.amax(x, groups), self.training, quantizer.history)
        if not taken and not mask:
            made = Rounded(quantizer.emulate(x, groups, random, amax))
        else:
            values, scale = quantizer.quantize(x, groups, random, amax)
            if taken:
                made = Rounded(values.to(hardware.TYPES[quantizer.format]), scale=scale)
            else:
                made = Rounded(quantizer.restore(values, scale), quantizer.holds(x, scale))
        if errors is not None and site is not None:
            rounded = made.value if made.scale is None else quantizer.restore(made.value.float(), made.scale)
            errors.add(site.name, f"{gemm}.{side}", x, rounded)
        return made

    def untransform(self, gemm: Gemm, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of an operand from that of the transformed one."""
        entry: GemmPrecision = getattr(self.precision, gemm)
        return inverse_hadamard(gradient, entry.hadamard, self._signs(gemm, gradient.device)) if entry.hadamard else gradient

    def _signs(self, gemm: Gemm, device: torch.device) -> torch.Tensor | None:
        entry: GemmPrecision = getattr(self.precision, gemm)
        if entry.signs == "none":
            return None
        if entry.signs == "fixed":
            return random_signs(entry.hadamard, random_key(0, "signs"), device)
        site = self.site or Site()
        random = (site.seed, "signs", site.step, f"{site.name}.{site.part} {gemm}")
        return random_signs(entry.hadamard, random_key(*random), device)

    def _stream(self, gemm: Gemm, side: Side, x: torch.Tensor, of: str, transposed: bool) -> Stream:
        """What is drawn for an operand, by the place that a value has in the whole of it (before it is transposed)."""
        site = self.site or Site()
        key = random_key(site.seed, "rounding", site.step, f"{site.name}.{site.part} {gemm}.{side}")
        shape = x.shape[::-1] if transposed else (x.numel() // x.shape[-1] if x.numel() else 0, x.shape[-1])
        rows = torch.arange(shape[0], device=x.device)
        cut_out, cut_in = (self.cut.along_out, not self.cut.along_out) if self.cut.ranks > 1 else (False, False)
        if of == "w":
            rows = rows + (self.cut.rank * shape[0] if cut_out else 0)
        elif site.tokens is not None:
            rows = site.tokens.flatten()
        cut_columns = cut_out if of == "dy" else cut_in
        whole = shape[1] * (self.cut.ranks if cut_columns else 1)
        return Stream(key, rows, whole, self.cut.rank * shape[1] if cut_columns else 0)


def dge_derivative(x: torch.Tensor, format: Format, power: float = 5.0, cap: float = 3.0) -> torch.Tensor:
    """The derivative of the smooth stand-in for rounding (arXiv 2501.17116, section 3.1): (1 / k) |2 t / d - 1|^(1 / k - 1), where x lies t above the next value of the format
    towards zero and d below the one beyond it; no more than `cap`.

    Args:
        x: fp32, any shape, in units of the scale.
    """
    magnitude = x.abs().clamp(max=format.max)
    exponent = torch.frexp(magnitude.clamp_min(2.0**format.min_exponent))[1] - 1
    step = torch.ldexp(torch.ones_like(magnitude), exponent - format.mantissa_bits)
    within = torch.remainder(magnitude, step) / step
    return ((2 * within - 1).abs().pow(1 / power - 1) / power).clamp(max=cap)
