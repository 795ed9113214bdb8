"""Quantised tensors as they are stored and sent: codes, scales as narrow as their rule allows, and files of them.

What `Quantizer.emulate` gives in fp32 is here 4 or 8 bits a value and one scale a group; `Packed.dequantize` gives the same bits back. Files are safetensors: a JSON
header and plain buffers, so that reading one runs nothing. They are written and read here because `kernels` imports no package but torch and triton.
"""

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from regrowth.errors import UserError
from regrowth.files import atomic_path
from regrowth.kernels.formats import E4M3, FORMATS, decode, decode_power, encode, encode_power, pack, round_to, unpack
from regrowth.kernels.quantize import AmaxGroups, Granularity, Quantizer, Rounding, Scale, _grouped, _reduce, over

_KIND = "regrowth.packed.1"
_DTYPES = {"U8": torch.uint8, "F32": torch.float32}
_ONE = 0x38  # 1.0 in E4M3


@dataclass(frozen=True)
class Packed:
    """A quantised tensor.

    Attributes:
        codes: uint8 of `shape`; of E2M1 two to a byte, the last dim halved, the first of a pair in the low half (`formats.pack`). Where a group became NaN, every code is
            the format's NaN without a sign, or 0 in E2M1, which has none: the scale says it.
        scales: one a group, [] per tensor, [...] per row, [..., n / block] per block, [..., m / block, n / block] per tile. fp32 for scale = "full"; uint8 E8M0 codes for
            "floor", "ceil" and "rms"; uint8 E4M3 codes for "two_level", where a group of zeros has that of 1.
        whole: fp32 [], which two_level's scales are relative to; else None.
        shape: of the tensor.
        quantizer: what made it.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    whole: torch.Tensor | None
    shape: tuple[int, ...]
    quantizer: Quantizer

    def scale_values(self) -> torch.Tensor:
        """The fp32 scales, in the shape of `scales`."""
        if self.quantizer.scale in ("full", "delayed"):
            return self.scales
        if self.whole is not None:
            return decode(self.scales, E4M3) * self.whole
        return decode_power(self.scales)

    def dequantize(self) -> torch.Tensor:
        """fp32 of `shape`, bit for bit what `quantizer.emulate` gives for the tensor that was packed."""
        assert self.quantizer.format is not None
        format, scale = FORMATS[self.quantizer.format], self.scale_values()
        values = decode(unpack(self.codes) if format.bits == 4 else self.codes, format)
        if self.quantizer.granularity != "tensor":
            scale = scale.unsqueeze(-1)
        if self.quantizer.granularity == "tile":
            scale = scale.unsqueeze(-3)
        values = _grouped(values, self.quantizer).mul_(scale).reshape(self.shape)
        return values if self.quantizer.shrink == 1.0 else over(values, self.quantizer.shrink)


@torch.no_grad()
def pack_tensor(x: torch.Tensor, quantizer: Quantizer, groups: AmaxGroups | None = None, random: torch.Tensor | None = None) -> Packed:
    """Quantise by the reference and keep codes: what faster kernels are held to, bit for bit.

    Args:
        x: [..., n], floating-point.
        groups: ranks that hold the other slices of x, as in `Quantizer.quantize`.
        random: integers of x's shape, for stochastic rounding (`rounding_bits`).

    Raises:
        ValueError: there is no format; `outliers` is set; a block does not divide its dim; the last dim of four-bit codes is odd; no random bits.
    """
    check_storable(quantizer)
    assert quantizer.format is not None
    format = FORMATS[quantizer.format]
    shape = expected_shapes(tuple(x.shape), quantizer)["scales"]
    values, scale = quantizer.quantize(x, groups, random)
    none = values.isnan()
    # A NaN's sign and payload differ between devices; of the stored bits no one shall depend on them.
    codes = encode(values.masked_fill(none, torch.nan if format.bits == 8 else 0.0), format)
    whole = None
    if quantizer.scale in ("full", "delayed"):
        scales = scale.masked_fill(scale.isnan(), torch.nan)
    elif quantizer.scale == "two_level":
        scales, whole = _two_level(x, quantizer, groups)
    else:
        scales = encode_power(scale)
    return Packed(pack(codes) if format.bits == 4 else codes, scales.reshape(shape), whole, tuple(x.shape), quantizer)


def check_storable(quantizer: Quantizer) -> None:
    """Raises ValueError if what `quantizer` makes has no codes."""
    if quantizer.format is None:
        raise ValueError("a quantiser without a format leaves tensors as they are: nothing to pack")
    if quantizer.outliers is not None:
        raise ValueError(
            f"outliers = {quantizer.outliers}: what is cut off is kept wide beside the values and has no codes; set outliers = None"
        )


def expected_shapes(shape: tuple[int, ...], quantizer: Quantizer) -> dict[str, tuple[int, ...]]:
    """The shapes of `codes` and `scales` for a tensor of `shape`.

    Raises:
        ValueError: a block or tile does not divide its dims; the last dim of four-bit codes is odd.
    """
    assert quantizer.format is not None
    codes, block = shape, quantizer.block
    if FORMATS[quantizer.format].bits == 4:
        if not shape or shape[-1] % 2:
            raise ValueError(f"two codes make a byte; the last dim of {shape[-1] if shape else 1} is odd")
        codes = (*shape[:-1], shape[-1] // 2)
    _grouped(torch.empty(shape, device="meta"), quantizer)
    scales = {
        "tensor": (),
        "row": shape[:-1],
        "block": (*shape[:-1], *(n // block for n in shape[-1:])),
        "tile": (*shape[:-2], *(n // block for n in shape[-2:])),
    }[quantizer.granularity]
    return {"codes": codes, "scales": scales}


def _two_level(x: torch.Tensor, quantizer: Quantizer, groups: AmaxGroups | None) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes of the groups' scales, and the tensor's: `Quantizer._scale_of` before it multiplies them, step by step."""
    assert quantizer.format is not None
    most, none = FORMATS[quantizer.format].max, x.new_zeros((), dtype=torch.float32)
    grouped = _grouped(x.float(), quantizer).abs()
    if quantizer.granularity == "tensor":
        amax = grouped.amax() if x.numel() else none
    elif x.numel():
        amax = grouped.amax(dim=(-3, -1) if quantizer.granularity == "tile" else -1)
    else:
        amax = none.expand(expected_shapes(tuple(x.shape), quantizer)["scales"]).clone()
    _reduce(amax, None if groups is None else {"tensor": groups.tensor, "row": groups.row}.get(quantizer.granularity))
    whole = amax.amax() if amax.numel() else none.clone()
    _reduce(whole, None if groups is None else groups.tensor)
    whole = over(whole, most * E4M3.max)
    whole = whole.where(whole != 0, 1.0)
    whole = whole.masked_fill(whole.isnan(), torch.nan)
    ratio = round_to(over(amax, most) / whole, E4M3).clamp_min(2.0 ** (E4M3.min_exponent - E4M3.mantissa_bits))
    codes = encode(ratio.masked_fill(ratio.isnan(), torch.nan), E4M3)
    return codes.where((amax != 0) | ~whole.isfinite(), _ONE), whole


def save_packed(path: Path, tensors: dict[str, Packed]) -> None:
    """Write quantised tensors as one safetensors file, atomically: `name.codes`, `name.scales`, `name.whole`; shapes and quantisers as JSON in its metadata."""
    parts = {f"{name}.{key}": part for name, packed in tensors.items() for key, part in _parts(packed).items()}
    parts = dict(
        sorted(parts.items(), key=lambda item: (item[1].dtype != torch.float32, item[0]))
    )  # the widest first, so that all are aligned
    told = {name: {"shape": list(packed.shape), "quantizer": asdict(packed.quantizer)} for name, packed in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "kind": _KIND, "packed": json.dumps(told)}}
    place = 0
    for name, part in parts.items():
        size = part.numel() * part.element_size()
        dtype = next(key for key, dtype in _DTYPES.items() if dtype == part.dtype)
        header[name] = {"dtype": dtype, "shape": list(part.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts.values():
            file.write(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def load_packed(path: Path) -> dict[str, Packed]:
    """Read what `save_packed` wrote, on the CPU.

    Raises:
        UserError: no such file; it is none of `save_packed`'s, or damaged; codes or scales are missing or do not have the shape that the tensor's quantiser asks for; a
            format or rule is unknown.
    """
    header, data = _read(path)
    metadata = header.pop("__metadata__", {})
    if metadata.get("kind") != _KIND:
        raise UserError(f"{path}: this file does not hold packed tensors (its kind is {metadata.get('kind')!r}, not {_KIND!r}). "
                        "Name a file that save_packed of this version wrote.")  # fmt: skip
    tensors = {}
    for name, told in _parsed(path, metadata.get("packed", "")).items():
        quantizer, shape = _quantizer(path, name, told), tuple(told["shape"])
        try:
            wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
                key: (of, torch.float32 if key == "scales" and quantizer.scale in ("full", "delayed") else torch.uint8)
                for key, of in expected_shapes(shape, quantizer).items()
            }
        except (ValueError, IndexError) as error:
            raise UserError(f"{path}: tensor {name} of shape {list(shape)} does not fit its quantiser: {error}. {_AGAIN}") from error
        if quantizer.scale == "two_level":
            wanted["whole"] = ((), torch.float32)
        found = {key: _tensor(path, name, key, header, data, *wanted[key]) for key in wanted}
        tensors[name] = Packed(found["codes"], found["scales"], found.get("whole"), shape, quantizer)
    return tensors


_AGAIN = "Write the file again with save_packed, or restore it from a copy."


def _parts(packed: Packed) -> dict[str, torch.Tensor]:
    parts = {"codes": packed.codes, "scales": packed.scales}
    return parts if packed.whole is None else {**parts, "whole": packed.whole}


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file. Give the path that save_packed was given.") from error
    try:
        (size,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + size].decode())
        assert isinstance(header, dict) and all(isinstance(entry, dict) for entry in header.values())
    except (struct.error, ValueError, OverflowError, AssertionError) as error:
        raise UserError(f"{path}: not readable as safetensors (its header is damaged). {_AGAIN}") from error
    return header, content[8 + size :]


def _parsed(path: Path, text: str) -> dict[str, dict[str, Any]]:
    try:
        told = json.loads(text)
        for entry in told.values():
            assert isinstance(entry["quantizer"], dict) and all(isinstance(n, int) and n >= 0 for n in entry["shape"])
        return told
    except (ValueError, AttributeError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"{path}: the header does not say what shapes and quantisers its tensors have. {_AGAIN}") from error


def _quantizer(path: Path, name: str, told: dict[str, Any]) -> Quantizer:
    known = {"format": tuple(FORMATS), "granularity": get_args(Granularity), "scale": get_args(Scale), "rounding": get_args(Rounding)}
    for key, values in known.items():
        value = told["quantizer"].get(key)
        if value not in values:
            raise UserError(f"{path}: tensor {name} has the unknown {key} {value!r} (known: {', '.join(values)}). "
                            "Read it with the version of Regrowth that wrote it, or write it again with a known one.")  # fmt: skip
    try:
        quantizer = Quantizer(**told["quantizer"])
        check_storable(quantizer)
        assert isinstance(quantizer.block, int) and quantizer.block > 0
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path}: tensor {name} has a quantiser that makes no sense here: {error or 'block'}. {_AGAIN}") from error
    return quantizer


def _tensor(
    path: Path, name: str, key: str, header: dict[str, Any], data: bytes, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """One buffer, once it is what the quantiser asks for."""
    told = header.get(f"{name}.{key}")
    if told is None:
        raise UserError(f"{path}: tensor {name} has no {key} ({name}.{key} is missing). {_AGAIN}")
    if told.get("shape") != list(shape) or _DTYPES.get(told.get("dtype")) != dtype:
        raise UserError(f"{path}: {key} of tensor {name} are {told.get('dtype')} {told.get('shape')}, but its shape and quantiser ask for "
                        f"{next(k for k, d in _DTYPES.items() if d == dtype)} {list(shape)}. {_AGAIN}")  # fmt: skip
    count = torch.Size(shape).numel()
    begin, end = told.get("data_offsets", (0, 0))
    if end - begin != count * dtype.itemsize or not 0 <= begin <= end <= len(data):
        raise UserError(f"{path}: the file ends before {key} of tensor {name}, or its header is damaged. {_AGAIN}")
    return torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
