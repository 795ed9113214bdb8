"""Shards give back what was written, as views of the file, and refuse to give anything else."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from regrowth.data_pipeline.shards import Shard, ShardWriter, shard_metadata, shard_schema
from regrowth.errors import UserError


def write(folder: Path, vocabulary: int = 1000, documents: int = 50, block: int = 200, shard: int = 2000) -> list[list[int]]:
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, vocabulary, size=rng.integers(1, 60)).tolist() for _ in range(documents)]
    schema = shard_schema(vocabulary, shard_metadata("d", vocabulary, "hash"))
    writer = ShardWriter(folder, "00000", schema, block, shard)
    for begin in range(0, documents, 7):  # added in batches that have nothing to do with the blocks
        some = rows[begin : begin + 7]
        count = len(some)
        columns = [
            pa.array(some, schema.field("tokens").type),
            pa.array([f"id{begin + i}" for i in range(count)]),
            pa.array(["d"] * count),
            pa.array([1] * count, pa.int8()),
            pa.array([["source", "normalise@1"]] * count),
            pa.nulls(count, schema.field("scores").type),
            pa.array([1.0] * count, pa.float32()),
        ]
        writer.add(pa.RecordBatch.from_arrays(columns, schema=schema), np.array([3 * len(row) for row in some]))
    writer.close()
    return rows


def read(folder: Path) -> list[list[int]]:
    rows = []
    for path in sorted(folder.glob("*.arrow")):
        shard = Shard(path)
        for number in range(len(shard.index.blocks)):
            tokens, offsets = shard.block(number)
            rows += [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    return rows


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1000, np.uint16), (65536, np.uint16), (65537, np.int32), (200_000, np.int32)])
def test_tokens_come_back_as_written_in_the_narrowest_type(vocabulary: int, dtype: type, tmp_path: Path) -> None:
    rows = write(tmp_path, vocabulary)
    assert read(tmp_path) == rows
    assert Shard(tmp_path / "00000-000.arrow").block(0)[0].dtype == dtype


def test_reading_copies_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    shard = Shard(tmp_path / "00000-000.arrow")
    tokens, offsets = shard.block(1)
    assert np.shares_memory(tokens, shard._mapped) and np.shares_memory(offsets, shard._mapped)


def test_datasets_opens_a_shard_as_it_is(tmp_path: Path) -> None:
    import datasets

    rows = write(tmp_path, shard=10**9)
    opened = datasets.Dataset.from_file(str(tmp_path / "00000-000.arrow"))
    assert opened["tokens"][:3] == rows[:3] and opened[4]["lineage"] == ["source", "normalise@1"] and opened[4]["domain"] == "d"


def test_half_a_shard_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "00000-000.arrow"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"00000-000\.arrow: damaged, .* bytes where its index says"):
        Shard(path)


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_an_altered_token_is_found_at_first_touch_and_by_verify(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "00000-000.arrow"
    flip_bit(path, Shard(path).index.blocks[2].values_offset + 7)
    shard = Shard(path)
    shard.block(0)
    with pytest.raises(UserError, match=r"00000-000\.arrow: damaged, the tokens of block 2"):
        shard.block(2)
    with pytest.raises(UserError, match="sha256"):
        shard.verify()


def test_an_altered_document_border_is_found_too(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "00000-000.arrow"
    flip_bit(path, Shard(path).index.blocks[1].row_offsets_offset + 8)
    with pytest.raises(UserError, match="block 1"):
        Shard(path).block(1)


def test_a_missing_shard_or_index_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "00000-000.arrow").unlink()
    with pytest.raises(UserError, match="the shard is missing"):
        Shard(tmp_path / "00000-000.arrow")
    with pytest.raises(UserError, match=r"00009\.json"):
        Shard(tmp_path / "00009.arrow")


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert [p.read_bytes() for p in sorted((tmp_path / "a").iterdir())] == [p.read_bytes() for p in sorted((tmp_path / "b").iterdir())]
