"""The safetensors files of a checkpoint, written as a stream.

torch's own writer for this format builds a whole file as one string of bytes first: twice the state in memory, and seconds in which no other Python
thread runs, the training loop's among them. Here every tensor goes from its buffer to the file in pieces, is hashed on the way by the rank that
writes it, and the lock of the interpreter is free meanwhile. Reading is torch's, but where one tensor at a time is wanted.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from regrowth.errors import UserError
from regrowth.pretrain.direct_file import DirectFile

_PIECE = 8 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class TensorFile:
    """A file that stands, and the sums of it (`sum_of_sums`) and of each tensor in it."""

    name: str
    size: int
    sum: str
    parts: list[list[Any]]  # [tensor's name, dtype, shape, place in the whole tensor, sha256]


class StreamedWriter(HuggingFaceStorageWriter):
    """For `dcp.save`: one file for each rank that has something to write; afterwards `files` lists all of them on the first rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.files: list[TensorFile] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; what it gives, `finish` gets of every rank."""
        future: Future[list[WriteResult]] = Future()
        results = []
        if plan.items:
            tensors, places = {}, {}
            for item in sorted(plan.items, key=lambda item: item.index.fqn):
                assert item.tensor_data is not None
                tensors[item.index.fqn] = planner.resolve_data(item).detach()
                places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            specs = {fqn: TensorSpec(tensor.dtype, tensor.shape) for fqn, tensor in tensors.items()}
            file = write_safetensors(self.folder / name, specs, tensors.__getitem__, places)
            results.append(WriteResult(index=plan.items[0].index, size_in_bytes=file.size, storage_data=file))
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on the first rank."""
        self.files = [result.storage_data for of_rank in results for result in of_rank]


class TensorSpec(NamedTuple):
    """What a file's header says of a tensor before its bytes are there."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize


class TensorReader:
    """Whole tensors of a checkpoint's `model/` or `optimizer/`, read one at a time whatever the files they were cut into.

    Raises (when called):
        UserError: there is no such tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[str, list[tuple[Path, list[int], list[int]]]] = {}  # file, place in the whole tensor, shape
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
                for name in file.keys():  # noqa: SIM118 - no dict
                    self._parts.setdefault(name, []).append((path, places[name]["saved_offsets"], file.get_slice(name).get_shape()))

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU."""
        if (parts := self._parts.get(name)) is None:
            remedy = ' Grow it without the optimizer\'s state: moments = "zero".' if self.folder.name == "optimizer" else ""
            raise UserError(f"{self.folder}: there is no tensor {name} in this checkpoint.{remedy}")
        if len(parts) == 1:
            with safe_open(parts[0][0], "pt") as file:
                return file.get_tensor(name)
        ends = [[begin + size for begin, size in zip(place, shape, strict=True)] for _, place, shape in parts]
        whole: torch.Tensor | None = None
        for path, place, shape in parts:
            with safe_open(path, "pt") as file:
                part = file.get_tensor(name)
            if whole is None:
                whole = torch.empty([max(dim) for dim in zip(*ends, strict=True)], dtype=part.dtype)
            whole[tuple(slice(begin, begin + size) for begin, size in zip(place, shape, strict=True))] = part
        assert whole is not None
        return whole


def sum_of_sums(header: str, tensors: Iterable[str]) -> str:
    """The sum of a file: sha256 over the sha256 of its header and of each tensor's bytes, in their order. Every byte is hashed once, for the file and for the
    content id, and by as many threads as there are tensors."""
    return hashlib.sha256("\n".join([header, *tensors]).encode()).hexdigest()


def sum_of_file(path: Path, pool: Executor) -> Callable[[], str]:
    """Begins to compute a file's sum from its bytes; the result waits for it.

    Raises (when called):
        ValueError: the header cannot be read.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError(f"{path}: no safetensors file")
        header = json.loads(stream.read(length))
    begin = 8 + length
    places = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    sums = [pool.submit(_hash, path, first, last) for first, last in [(0, begin), *((begin + a, begin + b) for a, b in places)]]
    return lambda: sum_of_sums(sums[0].result(), [tensor.result() for tensor in sums[1:]])


def _hash(path: Path, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(begin)
        while begin < end and (piece := stream.read(min(_PIECE, end - begin))):
            digest.update(piece)
            begin += len(piece)
    return digest.hexdigest()


def write_safetensors(path: Path, specs: dict[str, TensorSpec], get: Callable[[str], torch.Tensor], places: dict[str, Any]) -> TensorFile:
    """Write and sync one file; a tensor is asked for when its turn comes, and let go then.

    Args:
        places: where each tensor lies in the whole one, as torch's reader wants to be told.
    """
    metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.size
        header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head, parts = len(text).to_bytes(8, "little") + text, []
    with DirectFile(path) as stream:
        stream.write(head)
        for name, spec in specs.items():
            digest = hashlib.sha256()
            tensor = get(name)
            assert (tensor.dtype, tensor.shape) == spec, f"{name}: {tensor.dtype} {tuple(tensor.shape)}, announced as {spec}"
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(data), _PIECE):
                piece = data[begin : begin + _PIECE]
                stream.write(piece)
                digest.update(piece)
            parts.append([name, header[name]["dtype"], header[name]["shape"], places[name], digest.hexdigest()])
    whole = sum_of_sums(hashlib.sha256(head).hexdigest(), [part[-1] for part in parts])
    return TensorFile(path.name, len(head) + end, whole, parts)
