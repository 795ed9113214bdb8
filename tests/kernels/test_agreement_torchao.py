"""Our quantisers beside torchao's, value by value: the MX standard, NVFP4, and FP8 with fp32 scales. Where they differ, the test says where, and why."""

import math
from typing import Any

import pytest
import torch

from regrowth.kernels.formats import E2M1, E4M3, FORMATS, Format, decode, decode_power, encode_power, round_to, unpack
from regrowth.kernels.quantize import Quantizer
from tests.kernels.test_agreement import TORCHS, differs

pytest.importorskip("torchao", minversion="0.14", reason="torchao, whose quantisers are compared with ours, is in the gpu extra")
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def blocks() -> torch.Tensor:
    """Blocks of 32 [n, 32]: over 270 binades, with values many binades apart, amax at and beside powers of two and largest values, zeros, denormals."""
    g = generator()
    alike = torch.randn(4096, 32, generator=g) * torch.exp2(torch.randint(-149, 124, (4096, 1), generator=g).float())
    apart = torch.randn(2048, 32, generator=g) * torch.exp2(torch.randint(-30, 30, (2048, 32), generator=g).float())
    at = torch.tensor([m * 2.0**e for e in range(-140, 127) for m in (1.0, 1.5, 1.75)])
    amax = torch.cat([torch.nextafter(at, torch.zeros(())), at, torch.nextafter(at, torch.full((), math.inf))])
    edges = amax[:, None] * torch.cat([torch.ones(1), torch.linspace(-1, 1, 31)])
    return torch.cat([alike, apart, edges, torch.zeros(1, 32), -torch.zeros(1, 32)])


def to_mx(x: torch.Tensor, format: Format, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's (values in fp32 [n, 32], codes of their scales [n] int32)."""
    got: Any = MXTensor.to_mx(x, TORCHS.get(format.name, torch.float4_e2m1fn_x2), 32, scaling_mode=ScaleCalculationMode[mode])
    return _values(got, format), got.scale.view(torch.uint8).flatten().int()


def _values(got: Any, format: Format) -> torch.Tensor:
    return decode(unpack(got.qdata.view(torch.uint8)), E2M1) if format is E2M1 else got.qdata.float()


def ours_mx(x: torch.Tensor, format: Format, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    got, scales = Quantizer(format.name, "block", 32, scale).quantize(x)  # type: ignore[arg-type]
    return got, encode_power(scales).flatten().int()


def near_midpoint(exact: torch.Tensor, format: Format) -> torch.Tensor:
    """Whether a change by four roundings of fp32 (2^-22) would round an fp64 value elsewhere."""
    return round_to((exact * (1 + 2**-22)).float(), format) != round_to((exact * (1 - 2**-22)).float(), format)


@every_format
@pytest.mark.parametrize("rule", [("floor", "FLOOR"), ("ceil", "RCEIL")], ids=["floor", "rceil"])
def test_mx_blocks_agree_but_where_torchao_computes_the_scale_in_too_few_bits(format: Format, rule: tuple[str, str]) -> None:
    x = blocks()
    (mine, my_scale), (theirs, their_scale) = ours_mx(x, format, rule[0]), to_mx(x, format, rule[1])
    amax = x.abs().amax(1)
    assert (my_scale[amax == 0] == 127).all() and (their_scale[amax == 0] == 0).all(), "a block of zeros has scale 1, or the smallest"
    assert not differs(mine, theirs)[amax == 0].any()
    # Just above a power of two fp32's log2 is that of the power, and torchao's ceiling one too low: the largest value saturates.
    off = (my_scale != their_scale) & (amax > 0)
    above = torch.frexp(amax.double() / format.max).mantissa - 0.5
    assert (rule[0] == "ceil" and bool(off.any())) or not off.any()
    assert (above[off] > 0).all() and (above[off] < 2**-17).all() and (their_scale[off] == my_scale[off] - 1).all()
    # Code 0 stands for 2^-127, a denormal: torchao divides by 2^-126 for the floor rule, by 1 for the ceiling, so that its values are not those that its scale tells.
    smallest = (my_scale == 0) & (amax > 0)
    used = 2.0**-126 if rule[0] == "floor" else 1.0
    assert not differs(round_to(x[smallest] / used, format), theirs[smallest]).any()
    assert not differs(mine, theirs)[~off & ~smallest].any()


@every_format
def test_torchaos_ceil_and_even_are_other_rules(format: Format) -> None:
    """CEIL: 2^(ceil(log2 amax) - floor(log2 max)), a binade more than needed for amax between a power of two and the largest value's multiple of it (ours is RCEIL).
    EVEN: the floor rule after amax was rounded to the format's mantissa bits, a binade more where that carries into the next."""
    x = blocks()
    mantissa, exponent = torch.frexp(x.abs().amax(1))
    normal = (exponent > -100) & (mantissa > 0)  # no scale is clamped
    most = math.frexp(format.max)[0]
    for rule, mode, more in (
        ("ceil", "CEIL", (mantissa > 0.5) & (mantissa <= most)),
        ("floor", "EVEN", mantissa >= 1 - 2.0 ** -(format.mantissa_bits + 2)),
    ):
        (mine, my_scale), (theirs, their_scale) = ours_mx(x, format, rule), to_mx(x, format, mode)
        assert torch.equal(their_scale[normal], (my_scale + more.int())[normal]) and bool(more[normal].any())
        assert not differs(mine, theirs)[normal & ~more].any()
        # Under their scale, our rounding gives their values.
        assert not differs(round_to(x / decode_power(their_scale.to(torch.uint8))[:, None], format), theirs)[normal].any()


@every_format
def test_mx_of_bf16_and_of_what_is_not_finite(format: Format) -> None:
    x = blocks()[:4096].clamp(-1e30, 1e30).bfloat16()
    x = x[(x.abs().amax(1) > 2.0**-100)]
    assert not differs(ours_mx(x, format, "floor")[0], to_mx(x, format, "FLOOR")[0]).any()
    for mode, rule in (("FLOOR", "floor"), ("RCEIL", "ceil")):
        for bad in (math.nan, math.inf):
            x = torch.randn(2, 32, generator=generator())
            x[0, 3] = bad
            got = MXTensor.to_mx(
                x, TORCHS.get(format.name, torch.float4_e2m1fn_x2), 32, scaling_mode=ScaleCalculationMode[mode]
            ).dequantize()
            assert Quantizer(format.name, "block", 32, rule).emulate(x)[0].isnan().all()  # type: ignore[arg-type]
            # torchao's largest scale is finite: the infinity stays alone, under a scale that makes zeros of the rest of its block.
            rest = got[0, torch.arange(32) != 3]
            assert got[0].isnan().all() if math.isnan(bad) else got[0, 3].isinf() and (rest == 0).all()


def nvfp4(x: torch.Tensor, one_level: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's (values in fp32, E4M3 scales of blocks in fp32)."""
    got: Any = NVFP4Tensor.to_nvfp4(x, 16, None if one_level else per_tensor_amax_to_scale(x.abs().max()))
    return _values(got, E2M1), got.scale.float()


def published(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 in fp64 (arXiv 2509.25149): blocks' amax / 6 x s_enc, whose E4M3 rounding is S_b; and x s_enc / S_b."""
    grouped = x.double().unflatten(-1, (-1, 16))
    encode = 6 * 448 / x.double().abs().max()
    blocks = grouped.abs().amax(-1) / 6 * encode
    return blocks, (grouped * encode / round_to(blocks.float(), E4M3).clamp_min(2.0**-9).double()[..., None]).flatten(-2)


def tensors() -> dict[str, torch.Tensor]:
    """[256, 256], fp32."""
    g = generator()
    normal = torch.randn(256, 256, generator=g)
    binades = torch.exp2(torch.randint(-18, 1, (256, 16), generator=g).float()).repeat_interleave(16, 1)
    halves = torch.randint(-12, 13, (256, 256), generator=g) / 2
    halves[0, 0] = 6
    return {"normal": normal, "binades": normal * binades, "bf16": normal.bfloat16().float(), "halves": halves, "small": normal * 2.0**-100}


@pytest.mark.parametrize("name", tensors())
def test_two_levels_are_the_published_format_and_torchaos(name: str) -> None:
    x = tensors()[name]
    mine, scales = Quantizer("e2m1", "block", 16, "two_level").quantize(x)
    blocks, quotients = published(x)
    block_scales = (scales.squeeze(-1).double() / (x.abs().max().double() / 2688)).float()
    scale_of_block = round_to(block_scales, E4M3)
    torch.testing.assert_close(block_scales, scale_of_block, rtol=1e-6, atol=0)
    live = blocks > 0
    wanted = round_to(blocks.float(), E4M3).clamp_min(2.0**-9)
    assert (near_midpoint(blocks, E4M3) | (scale_of_block == wanted) | ~live).all()
    # fp32 cannot hold s_enc and its inverse: values within its roundings of a midpoint may go to the other side.
    assert torch.equal(scale_of_block[live], wanted[live])
    off = mine != round_to(quotients.float(), E2M1)
    assert (off <= near_midpoint(quotients, E2M1)).all() and off.float().mean() < 0.02
    # torchao's smallest block scale is E4M3's smallest normal number, 2^-6; below it ours go on to 2^-9, as the format has them.
    theirs, their_scales = nvfp4(x)
    assert torch.equal(their_scales[live], wanted.clamp_min(2.0**-6)[live]) and bool((wanted < 2.0**-6)[live].any()) == (name == "binades")
    # It multiplies by a reciprocal where ours divides: the same values again but for those next to a midpoint.
    same = (their_scales == wanted).repeat_interleave(16, 1)
    assert ((mine != theirs) & same <= near_midpoint(quotients, E2M1)).all()
    if name == "normal":
        assert torch.equal(mine, theirs)


def test_one_level_is_two_levels_of_a_tensor_whose_largest_value_is_2688() -> None:
    x = tensors()["normal"] * 100
    x[0, 0] = 2688.0
    (theirs, scales), (mine, my_scales) = nvfp4(x, one_level=True), Quantizer("e2m1", "block", 16, "two_level").quantize(x)
    assert torch.equal(mine, theirs) and torch.equal(my_scales.squeeze(-1), scales)


def test_what_nvfp4_tensors_without_a_scale_become() -> None:
    """torchao divides by the scale of the whole: 0 / 0 for a tensor of zeros, and for one so small that the inverse of its scale is past fp32, infinity."""
    quantizer = Quantizer("e2m1", "block", 16, "two_level")
    assert (quantizer.emulate(torch.zeros(2, 16)) == 0).all() and nvfp4(torch.zeros(2, 16))[1].isnan().all()
    tiny = torch.linspace(-1, 1, 32).reshape(2, 16) * 1e-38
    assert (nvfp4(tiny)[0].abs() == 6).all() and quantizer.emulate(tiny).unique().numel() > 8
    for bad in (math.nan, math.inf):
        x = torch.randn(2, 32, generator=generator())
        x[0, 3] = bad
        whole = NVFP4Tensor.to_nvfp4(x, 16, per_tensor_amax_to_scale(x.abs().max())).dequantize()
        assert whole.isnan().all() and quantizer.emulate(x).isnan().all(), "the scale of the whole is lost, with both"


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("format", [FORMATS["e4m3"], FORMATS["e5m2"]], ids=["e4m3", "e5m2"])
def test_fp8_with_fp32_scales_agrees_but_next_to_midpoints(format: Format, granularity: str) -> None:
    along: dict[str, Any] = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1} if granularity == "row" else {}

    def theirs(x: torch.Tensor) -> Any:
        return hp_tensor_to_float8_dynamic(x, TORCHS[format.name], LinearMMConfig(), **along)

    quantizer = Quantizer(format.name, granularity)  # type: ignore[arg-type]
    for name, x in tensors().items():
        if name == "small":  # torchao takes amax below 1e-12 as 1e-12: values far below are lost, by design
            lost, kept = theirs(x).to_original_precision(), quantizer.emulate(x)
            assert (lost == 0).all() and kept.abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)
            continue
        # max / amax in fp64 rounded to fp32, and times it, where ours divides by amax / max.
        amax = x.double().abs().amax(-1, keepdim=True) if granularity == "row" else x.double().abs().max()
        exact = x.double() * (format.max / amax)
        wrong = differs(quantizer.quantize(x)[0], theirs(x)._data.float())
        assert (wrong <= near_midpoint(exact, format)).all() and wrong.float().mean() < 0.02
    for bad in (math.nan, math.inf):
        x = torch.randn(2, 32, generator=generator())
        x[0, 3] = bad
        assert torch.equal(theirs(x).to_original_precision().isnan(), quantizer.emulate(x).isnan())
