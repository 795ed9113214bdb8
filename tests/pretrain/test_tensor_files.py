"""Streamed safetensors are what the safetensors library writes and reads."""

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from regrowth.pretrain.direct_file import DirectFile
from regrowth.pretrain.tensor_files import TensorReader, TensorSpec, sum_of_file, write_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(4, 6).t(),  # not contiguous
        "c": torch.randn(7).bfloat16(),
        "d": torch.tensor(2.5),
        "e": torch.empty(0, 4),
        "f": torch.arange(5),
        "g": torch.randn(3 << 20),  # more than a piece
    }


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """What the header needs."""
    return {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def test_whole_tensors_are_read_out_of_their_parts(tmp_path: Path) -> None:
    whole = torch.randn(5, 4)
    for number, (row, column, rows, columns) in enumerate([(0, 0, 3, 4), (3, 0, 2, 1), (3, 1, 2, 3)]):
        part = {"w": whole[row : row + rows, column : column + columns].contiguous(), f"own{number}": torch.full((2,), float(number))}
        places = {"w": {"saved_offsets": [row, column]}, f"own{number}": {"saved_offsets": [0]}}
        write_safetensors(tmp_path / f"{number}.safetensors", specs_of(part), part.__getitem__, places)
    read = TensorReader(tmp_path)
    assert torch.equal(read("w"), whole) and read("own2").tolist() == [2, 2]


def test_the_library_reads_what_was_written_and_hashes_are_of_the_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    places = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    file = write_safetensors(tmp_path / "x.safetensors", specs_of(tensors), tensors.__getitem__, places)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert file.size == (tmp_path / "x.safetensors").stat().st_size
    with ThreadPoolExecutor(2) as pool:
        assert file.sum == sum_of_file(tmp_path / "x.safetensors", pool)()
    assert [part[0] for part in file.parts] == list(tensors)
    assert file.parts[0][1:] == ["F32", [3, 5], {"saved_offsets": [0, 0]}, hashlib.sha256(tensors["a"].numpy().tobytes()).hexdigest()]


def test_the_header_says_what_torchs_reader_wants(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2, 2)}
    write_safetensors(tmp_path / "ours.safetensors", specs_of(tensors), tensors.__getitem__, {"w": {"saved_offsets": [4, 0]}})
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    with safe_open(tmp_path / "ours.safetensors", "pt") as ours, safe_open(tmp_path / "theirs.safetensors", "pt") as theirs:
        assert ours.metadata()["DCP_SHARDING_INFO"] == '{"w": {"saved_offsets": [4, 0]}}' and ours.metadata()["format"] == "pt"
        assert list(ours.keys()) == list(theirs.keys())


@pytest.mark.parametrize("size", [0, 1, 4096, 8 << 20, (8 << 20) + 4097])
@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_a_file_past_the_page_cache_has_what_was_written(size: int, folder: str, tmp_path: Path) -> None:
    if folder == "memory" and not Path("/dev/shm").is_dir():
        pytest.skip("no file system in memory here, which takes no direct writes")
    data = bytes(range(251)) * (size // 251 + 1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if folder == "memory" else tmp_path) as place:
        with DirectFile(Path(place) / "x") as file:
            for begin in range(0, size, 5_000_011):
                file.write(memoryview(data)[begin : min(size, begin + 5_000_011)])
        assert (Path(place) / "x").read_bytes() == data[:size]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, the disk that is always full")
def test_a_full_disk_is_told_when_the_file_is_closed_at_the_latest() -> None:
    with pytest.raises(OSError, match="No space left"), DirectFile(Path("/dev/full")) as file:
        file.write(bytes(20 << 20))
