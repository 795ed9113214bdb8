"""Packed tensors give back, bit for bit, what emulation gives; their files refuse what does not agree."""

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from regrowth.errors import UserError
from regrowth.kernels.formats import FORMATS, unpack
from regrowth.kernels.packed import Packed, load_packed, pack_tensor, save_packed
from regrowth.kernels.quantize import Granularity, Quantizer, Scale
from regrowth.kernels.random import global_index, random_bits, random_key

BITS = random_bits(random_key(0, "packed"), global_index((64, 64)))


def samples() -> dict[str, torch.Tensor]:
    """Tensors [64, 64] that meet every corner: magnitudes far apart, zeros, groups of zeros, denormals, and values that are none."""
    wide = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)[:, None]
    wide[:, 3], wide[5], wide[16:32, :16] = 0.0, -0.0, 0.0
    spoilt = wide.clone()
    spoilt[3, 4], spoilt[40, 50], spoilt[50, 20] = torch.nan, torch.inf, -torch.inf
    return {
        "wide": wide,
        "bf16": wide.bfloat16(),
        "fp16": (wide / 1000).half(),
        "spoilt": spoilt,
        "zeros": torch.zeros(64, 64),
        "tiny": wide * 1e-40,
        "huge": wide.sign() * 3e38,
    }


def rules() -> list[tuple[Granularity, Scale]]:
    """Every granularity with every scale that is defined for it."""
    granularities: tuple[Granularity, ...] = ("tensor", "row", "block", "tile")
    scales: tuple[Scale, ...] = ("full", "floor", "ceil", "two_level", "rms")
    return [(g, s) for g, s in itertools.product(granularities, scales) if s != "rms" or g in ("block", "tile")]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, the sign of zero included; a NaN equals a NaN."""
    none = a.isnan()
    return a.shape == b.shape and torch.equal(none, b.isnan()) and torch.equal(a.view(torch.int32)[~none], b.view(torch.int32)[~none])


@pytest.mark.parametrize(("granularity", "scale"), rules())
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_packed_is_what_is_emulated(format: str, granularity: Granularity, scale: Scale) -> None:
    if scale == "rms" and format != "e2m1":
        return
    for shrink, rounding, (name, x) in itertools.product((1.0, 0.75), ("nearest", "stochastic"), samples().items()):
        quantizer = Quantizer(format, granularity, 16, scale, rounding, shrink)  # type: ignore[arg-type]
        packed = pack_tensor(x, quantizer, random=BITS)
        assert packed.codes.numel() == x.numel() * FORMATS[format].bits // 8
        wanted = quantizer.emulate(x.float(), random=BITS)
        got = packed.dequantize()
        assert same(got, wanted), (name, shrink, rounding)


def test_the_stored_scale_is_the_one_that_was_used() -> None:
    x = samples()["wide"]
    for (granularity, scale), format in itertools.product(rules(), FORMATS):
        if scale != "rms" or format == "e2m1":
            quantizer = Quantizer(format, granularity, 16, scale)  # type: ignore[arg-type]
            packed, wanted = pack_tensor(x, quantizer), quantizer.scales(x)
            assert packed.scales.dtype == (torch.float32 if scale == "full" else torch.uint8) and (packed.whole is not None) == (
                scale == "two_level"
            )
            alive = wanted != 1.0  # a group of zeros has scale 1, in two levels 1 of the tensor's
            assert torch.equal(packed.scale_values().reshape(wanted.shape)[alive], wanted[alive])


def test_two_codes_share_a_byte_and_no_stored_bit_depends_on_a_nans_sign() -> None:
    x = torch.tensor([[1.0, -6.0, 0.5, 3.0]])
    packed = pack_tensor(x, Quantizer("e2m1"))
    assert packed.codes.tolist() == [[0xF2, 0x51]] and unpack(packed.codes).tolist() == [[2, 15, 1, 5]]
    for sign in (1.0, -1.0):
        x = torch.full((1, 4), torch.nan).copysign(torch.tensor(sign))
        for scale in ("full", "floor", "two_level"):
            assert pack_tensor(x, Quantizer("e2m1", scale=scale)).codes.tolist() == [[0, 0]]
            packed = pack_tensor(x, Quantizer("e4m3", scale=scale))
            assert packed.codes.tolist() == [[0x7F] * 4] and packed.dequantize().isnan().all()
        assert pack_tensor(x, Quantizer("e4m3")).scales.view(torch.int32).item() == 0x7FC00000


def test_empty_tensors_and_more_dims() -> None:
    for (granularity, scale), shape in itertools.product(rules(), [(0, 32), (2, 32, 48), (3, 2, 16, 16)]):
        quantizer = Quantizer("e2m1", granularity, 16, scale)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if scale == "rms" and not x.numel():
            continue  # torch warns of a deviation of nothing
        assert same(pack_tensor(x, quantizer).dequantize(), quantizer.emulate(x))


def test_what_has_no_codes_is_refused() -> None:
    x = torch.ones(2, 6)
    with pytest.raises(ValueError, match="without a format"):
        pack_tensor(x, Quantizer())
    with pytest.raises(ValueError, match="has no codes; set outliers = None"):
        pack_tensor(x, Quantizer("e4m3", outliers=0.99))
    with pytest.raises(ValueError, match="do not divide the contracted dim of 6"):
        pack_tensor(x, Quantizer("e4m3", "block", 4))
    with pytest.raises(ValueError, match="the last dim of 3 is odd"):
        pack_tensor(x[:, :3], Quantizer("e2m1"))
    with pytest.raises(ValueError, match="needs random bits"):
        pack_tensor(x, Quantizer("e4m3", rounding="stochastic"))


def written(path: Path) -> dict[str, Packed]:
    x = samples()["wide"]
    tensors = {
        f"layers.0.{format}.{granularity}.{scale}": pack_tensor(x, Quantizer(format, granularity, 16, scale, shrink=0.75))  # type: ignore[arg-type]
        for (granularity, scale), format in itertools.product(rules(), FORMATS)
        if scale != "rms" or format == "e2m1"
    }
    tensors["empty"] = pack_tensor(x[:0], Quantizer("e4m3"))
    save_packed(path, tensors)
    return tensors


def test_a_file_gives_back_every_bit_and_is_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    tensors = written(path)
    loaded = load_packed(path)
    assert list(loaded) == list(tensors)
    theirs = load_file(path)
    for name, packed in tensors.items():
        got = loaded[name]
        assert (got.shape, got.quantizer) == (packed.shape, packed.quantizer)
        assert torch.equal(got.codes, packed.codes) and torch.equal(got.scales, packed.scales) and got.scales.shape == packed.scales.shape
        assert torch.equal(theirs[f"{name}.codes"], packed.codes) and torch.equal(theirs[f"{name}.scales"], packed.scales)
        assert same(got.dequantize(), packed.dequantize())
        assert (got.whole is None) == (packed.whole is None) and (
            packed.whole is None or torch.equal(theirs[f"{name}.whole"], packed.whole)
        )
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["packed"])
    assert told["empty"] == {"shape": [0, 64], "quantizer": {"format": "e4m3", "granularity": "row", "block": 128, "scale": "full", "rounding": "nearest", "shrink": 1.0, "history": 16, "margin": 0, "outliers": None}}  # fmt: skip


def spoil(path: Path, told: dict[str, Any] | None = None, **parts: torch.Tensor | None) -> Path:
    """A file as another program would write it, with something changed; a part of None is left out."""
    tensors, (name,) = load_file(path), load_packed(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for key, part in parts.items():
        tensors.pop(f"{name}.{key}", None)
        if part is not None:
            tensors[f"{name}.{key}"] = part
    entry = json.loads(metadata["packed"])[name]
    entry = {**entry, **(told or {}), "quantizer": {**entry["quantizer"], **(told or {}).get("quantizer", {})}}
    save_file(tensors, path.with_name("spoilt.safetensors"), {**metadata, "packed": json.dumps({name: entry})})
    return path.with_name("spoilt.safetensors")


def test_a_file_that_does_not_agree_with_itself_is_refused_by_name_and_with_a_remedy(tmp_path: Path) -> None:
    path, byte = tmp_path / "w.safetensors", torch.zeros(4, 4, dtype=torch.uint8)
    save_packed(path, {"head": pack_tensor(torch.ones(4, 64), Quantizer("e4m3", "block", 16, "two_level"))})
    assert list(load_packed(spoil(path))) == ["head"], "another writer's order of tensors is as good"
    wrong: list[tuple[str, Any, dict[str, Any]]] = [
        ("tensor head has no scales", None, {"scales": None}),
        ("tensor head has no whole", None, {"whole": None}),
        (r"codes of tensor head are U8 \[4, 4\], but its shape and quantiser ask for U8 \[4, 64\]", None, {"codes": byte}),
        (r"scales of tensor head are F32 \[4, 4\]", None, {"scales": byte.float()}),
        (r"codes of tensor head are U8 \[4, 64\].* U8 \[4, 32\]", {"quantizer": {"format": "e2m1"}}, {}),
        (r"tensor head has the unknown format 'e3m2' \(known: e2m1, e4m3, e5m2\)", {"quantizer": {"format": "e3m2"}}, {}),
        ("tensor head has the unknown scale 'log'", {"quantizer": {"scale": "log"}}, {}),
        ("tensor head has a quantiser that makes no sense", {"quantizer": {"size": 3}}, {}),
        ("tensor head has a quantiser that makes no sense", {"quantizer": {"block": 0}}, {}),
        (r"tensor head of shape \[4, 65\] does not fit its quantiser", {"shape": [4, 65]}, {}),
    ]
    for message, told, parts in wrong:
        with pytest.raises(UserError, match=f"spoilt.safetensors: {message}") as caught:
            load_packed(spoil(path, told, **parts))
        assert "rite it again" in str(caught.value) or "Write the file again" in str(caught.value)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="there is no such file"):
        load_packed(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(UserError, match="does not hold packed tensors"):
        load_packed(path)
    save_packed(path, {"head": pack_tensor(torch.ones(4, 64), Quantizer("e4m3"))})
    whole = path.read_bytes()
    (size,) = struct.unpack_from("<Q", whole)
    for content, message in [
        (whole[:-1], "the file ends before"),
        (whole[:4], "not readable as safetensors"),
        (b"\xff" * 8 + whole[8:], "not readable as safetensors"),
        (whole[:20], "not readable as safetensors"),
        (whole[:8] + b"[]".ljust(size) + whole[8 + size :], "not readable as safetensors"),
        (whole.replace(b'\\"quantizer\\"', b'\\"quantisor\\"'), "does not say what shapes"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_packed(path)
