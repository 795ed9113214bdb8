"""FSDP's all-gathers of weights in eight bits: a weight whose products all take it rounded to one scale is rounded before it is sent.

What arrives is what the linear would have made of the wide weight, bit for bit: ranks agree on the largest value of the whole weight first, in one exchange for all of
them, and the linear takes that instead of looking for its own. Half the bytes of bf16, a quarter of fp32's.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from regrowth.kernels.linear import LowPrecisionLinear
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.recipe import LinearPrecision
from regrowth.parallel.dtensor import local_tensor
from regrowth.parallel.mesh import Mesh

_BYTES = {
    "e2m1": torch.float8_e4m3fn,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}  # the narrowest type here that holds a format
_REPEATS = 10


def narrow_weight(precision: LinearPrecision) -> Quantizer | None:
    """How a linear rounds its weight, if it does so once and for both products, by one scale of the whole."""
    forward, dgrad = precision.forward, precision.dgrad
    quantizer = forward.b
    plain = quantizer == Quantizer(quantizer.format, "tensor", quantizer.block, history=quantizer.history, margin=quantizer.margin)
    if quantizer.format is None or not plain or dgrad.b != quantizer or forward.hadamard or dgrad.hadamard:
        return None
    return quantizer if precision.estimator == "straight" else None


class NarrowGather:
    """The weights of the sharded linears of this rank's stages, which a recipe may have gathered in eight bits and later, or for a step, wide again.

    Args:
        modules: after `shard`, with their values in place.
        choice: "narrow": wherever the recipe allows it; "auto": where it is measured to be faster, too, which on a CPU is not looked for.
    """

    def __init__(self, modules: Sequence[nn.Module], mesh: Mesh, choice: str) -> None:
        self._groups = [group for name in ("fsdp", "tp") if (group := mesh.group(name)) is not None]
        self._measured: dict[tuple[int, torch.dtype], bool] | None = {} if choice == "auto" else None
        self._device, self._mesh, self._world = mesh.device, mesh.group("fsdp"), mesh.size("fsdp")
        self._sharded = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
        for module in modules:
            if isinstance(module, FSDPModule):
                module._get_fsdp_state()._lazy_init()  # it would be done before the first forward pass, and records replaced by it
        self._weights = [weight for module in modules for weight in _sharded_weights(module)]
        self._amax = torch.zeros(len(self._weights), device=mesh.device)
        self._amax_of = self._amax.unbind()  # always the same tensors, for blocks that are compiled

    @torch.no_grad()
    def prepare(self) -> None:
        """Before a step or an evaluation: let the weights be gathered as their linears will take them; collective over the ranks that share them."""
        chosen = [(number, weight) for number, weight in enumerate(self._weights) if self._is_narrow(weight)]
        for weight in self._weights:
            weight.narrow = False
        for number, weight in chosen:
            local = weight.local()
            if local.numel():
                least, most = torch.aminmax(local)
                self._amax[number] = torch.maximum(most, -least).to(weight.dtype).float()  # the NaN of either is kept
            else:
                self._amax[number] = 0.0
            weight.narrow = True
        if chosen:
            self._amax.nan_to_num_(float("inf"), float("inf"))
            for group in self._groups:
                dist.all_reduce(self._amax, op=dist.ReduceOp.MAX, group=group)
        if any(weight.changes for weight in self._weights):
            for module in self._sharded:
                module.reshard()  # an evaluation may have left them gathered as they were
        for number, weight in enumerate(self._weights):
            weight.settle(self._amax_of[number])

    def _is_narrow(self, weight: "_Weight") -> bool:
        quantizer = narrow_weight(weight.linear.precision)
        if quantizer is None or weight.linear.site.errors is not None:  # errors are those of the wide weight
            return False
        if self._measured is None:
            return True
        if self._device.type == "cpu":
            return False
        kind = (weight.padded.numel(), weight.dtype)  # the same on all ranks, also where they do not divide the weight
        if kind not in self._measured:
            self._measured[kind] = self._gains(kind[0], kind[1], quantizer)
        return self._measured[kind]

    def _gains(self, numel: int, dtype: torch.dtype, quantizer: Quantizer) -> bool:
        """Whether rounding, sending bytes and scaling back takes the slowest rank less time than sending; what else the network is at, then, is left out."""
        wide = torch.randn(numel, device=self._device).to(dtype)
        received = {kind: torch.empty(numel * self._world, dtype=kind, device=self._device) for kind in (dtype, torch.uint8)}
        amax, scale = wide.float().abs().amax(), torch.ones((), device=self._device)

        def send_wide() -> None:
            dist.all_gather_into_tensor(received[dtype], wide, group=self._mesh)

        def send_narrow() -> None:
            dist.all_gather_into_tensor(received[torch.uint8], encode(wide, quantizer, amax)[0], group=self._mesh)
            decode(received[torch.uint8], scale, quantizer, dtype)

        times = []
        for send in (send_wide, send_narrow):
            send()
            torch.cuda.synchronize(self._device)
            begin = time.perf_counter()
            for _ in range(_REPEATS):
                send()
            torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - begin)
        both = torch.tensor(times, device=self._device)
        for group in self._groups:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        return bool(both[1] < both[0])


def encode(weight: torch.Tensor, quantizer: Quantizer, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 codes of weight's shape, fp32 scale) under the largest magnitude of the whole."""
    values, scale = quantizer.quantize(weight, amax=amax)
    assert quantizer.format is not None
    return values.to(_BYTES[quantizer.format]).view(torch.uint8), scale


def decode(codes: torch.Tensor, scale: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
    """The rounded values."""
    assert quantizer.format is not None
    return (codes.view(_BYTES[quantizer.format]).float() * scale).to(dtype)


class _Weight:
    """A linear's weight in FSDP's hands, which asks its shard before and after a gather whether there is something to be done (`fsdp_pre_all_gather`)."""

    def __init__(self, linear: LowPrecisionLinear, parameter: Any) -> None:
        self.linear, self._parameter = linear, parameter  # FSDP's own record of it
        self.narrow = self._was_narrow = False

    def local(self) -> torch.Tensor:
        """This rank's shard."""
        return local_tensor(self._parameter.sharded_param)

    @property
    def changes(self) -> bool:
        """Whether the next gather is to be of another kind than the last."""
        return self.narrow != self._was_narrow

    @property
    def padded(self) -> torch.Size:
        """Of every rank's shard, as it is sent."""
        return self._parameter.padded_sharded_param_size

    @property
    def dtype(self) -> torch.dtype:
        """That it is gathered in, and multiplied."""
        return self._parameter.param_dtype or self._parameter.orig_dtype

    def settle(self, amax: torch.Tensor) -> None:
        """Do as `narrow` says from the next gather on."""
        shard = self._parameter._sharded_local_tensor
        if self.narrow:
            # FSDP asks for these two by name, of whatever tensor it holds; so the shard stays a plain one, for optimizers and checkpoints.
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self._before, self._after
        elif hasattr(shard, "fsdp_pre_all_gather"):
            del shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather
        self.linear.weight_amax = amax if self.narrow else None
        if self.changes:  # what was gathered into is of the other type
            self._parameter._init_extensions()
            self._parameter.all_gather_outputs = []
            if hasattr(self._parameter, "_unsharded_param"):
                del self._parameter._unsharded_param
            self._was_narrow = self.narrow

    def _before(self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any) -> Any:
        quantizer, amax = self.linear.precision.forward.b, self.linear.weight_amax
        assert amax is not None
        flat = self._parameter._sharded_param_data.to(amax.device, self.dtype)  # with what fills it up where ranks do not divide it
        codes, scale = encode(flat.view(self.padded), quantizer, amax)
        return (codes,), (scale, quantizer, outer_size)

    def _after(self, gathered: tuple[torch.Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> Any:
        scale, quantizer, size = metadata
        whole = decode(gathered[0].reshape(-1)[: size.numel()].view(size), scale, quantizer, dtype)
        if out is None:
            return whole, (whole,)
        with torch.autograd._unsafe_preserve_version_counter(out):
            out.data.copy_(whole)
        return None


def _sharded_weights(model: nn.Module) -> Iterator[_Weight]:
    """Of linears that may follow recipes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for parameter in (parameter for group in groups if group is not None for parameter in group.fsdp_params):
                owner = parameter._module_info.module
                if isinstance(owner, LowPrecisionLinear) and parameter._module_info.param_name == "weight":
                    yield _Weight(owner, parameter)
