"""Sources read what they say, and lose nothing silently: what cannot be used is dropped by name."""

import bz2
import functools
import gzip
import http.server
import json
import lzma
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.shard_tools import export_megatron
from regrowth.data_pipeline.source_config import (
    ArrowSource,
    DatasetsSource,
    InstalledSource,
    JsonlSource,
    MegatronSource,
    ParquetSource,
    TextSource,
)
from regrowth.data_pipeline.sources.base import Source
from regrowth.data_pipeline.sources.files import JsonlFiles, TextFiles
from regrowth.data_pipeline.sources.hub import HubDataset
from regrowth.data_pipeline.sources.installed import InstalledText
from regrowth.data_pipeline.sources.megatron import MegatronFiles
from regrowth.data_pipeline.sources.tables import ArrowFiles, ParquetFiles
from regrowth.errors import UserError

TARGET = 8 << 20


def read_all(source: Source) -> list[Raw]:
    return [document for item in source.items(TARGET) for document in source.read(item)]


PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("packing", PACKERS)
def test_jsonl_reads_the_same_rows_from_every_packing(packing: str, tmp_path: Path) -> None:
    rows = [{"text": f"document {i} é", "domain": "d" if i % 2 else "e", "url": f"u{i}"} for i in range(5)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / f"file.jsonl{packing}").write_bytes(PACKERS[packing](data))
    found = read_all(JsonlFiles(JsonlSource(kind="jsonl", path=str(tmp_path))))
    assert [(d.text, d.domain, d.meta["url"]) for d in found] == [(r["text"], r["domain"], r["url"]) for r in rows]


def test_jsonl_drops_broken_rows_by_name_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{not json",
        b'{"body": 1}',
        b'{"text": "' + b"x" * 2000 + b'"}',
        b"",
        b'{"text": "bad \xff utf8"}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    found = read_all(JsonlFiles(JsonlSource(kind="jsonl", path=str(path), max_line_megabytes=0.001)))
    assert [d.dropped for d in found] == ["", "not_json", "no_text", "line_too_long", "", ""]
    assert [d.text for d in found if not d.dropped] == ["good", "bad � utf8", "last"]
    assert found[1].source.endswith(f"odd.jsonl@{len(lines[0]) + 1}")


@pytest.mark.parametrize("packing", [".gz", ".xz", ".bz2", ".zst"])
def test_a_truncated_file_keeps_what_came_before_the_cut(packing: str, tmp_path: Path) -> None:
    data = "".join(json.dumps({"text": f"document {i} " + "word " * (i % 97)}) + "\n" for i in range(20000)).encode()
    packed = PACKERS[packing](data)
    (tmp_path / f"cut.jsonl{packing}").write_bytes(packed[: len(packed) * 2 // 3])
    found = read_all(JsonlFiles(JsonlSource(kind="jsonl", path=str(tmp_path))))
    whole = [d for d in found if not d.dropped]
    assert found[-1].dropped == "damaged_file"
    assert whole == [] or whole[0].text.startswith("document 0")


def test_text_files_take_their_domain_from_the_first_folder(tmp_path: Path) -> None:
    for name in ("law/a.txt", "law/sub/b.md", "news/c.txt", "news/skip.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"text of {name}".encode())
    found = read_all(TextFiles(TextSource(kind="text", path=str(tmp_path))))
    assert sorted((d.domain, d.text) for d in found) == [
        ("law", "text of law/a.txt"),
        ("law", "text of law/sub/b.md"),
        ("news", "text of news/c.txt"),
    ]


def test_parquet_reads_its_rows_and_names_a_missing_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", None], "domain": ["x", "y", "x"]}), tmp_path / "t.parquet")
    found = read_all(ParquetFiles(ParquetSource(kind="parquet", path=str(tmp_path))))
    assert [(d.text, d.domain, d.dropped) for d in found] == [("a", "x", ""), ("b", "y", ""), ("", "x", "no_text")]
    with pytest.raises(UserError, match=r"no column 'body'.*text, domain"):
        read_all(ParquetFiles(ParquetSource(kind="parquet", path=str(tmp_path), text_key="body")))
    (tmp_path / "a_bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"a_bad\.parquet"):
        read_all(ParquetFiles(ParquetSource(kind="parquet", path=str(tmp_path))))


def test_datasets_reads_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two", "three"]}).save_to_disk(str(tmp_path / "saved"))
    found = read_all(HubDataset(DatasetsSource(kind="datasets", path=str(tmp_path / "saved"), domain="d", max_documents=2)))
    assert [(d.text, d.domain) for d in found] == [("one", "d"), ("two", "d")]
    with pytest.raises(UserError, match="no column 'body'"):
        read_all(HubDataset(DatasetsSource(kind="datasets", path=str(tmp_path / "saved"), text_key="body")))


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        JsonlFiles(JsonlSource(kind="jsonl", path=str(tmp_path / "nowhere"))).items(TARGET)
    with pytest.raises(UserError, match=r"no file in this folder ends in \.txt"):
        TextFiles(TextSource(kind="text", path=str(tmp_path))).items(TARGET)


@pytest.mark.slow
def test_the_installation_gives_three_domains_of_real_text_and_no_docstring_twice() -> None:
    source = InstalledText(InstalledSource(kind="installed", max_megabytes=1.0))
    documents = [d for d in read_all(source) if not d.dropped]
    by_domain = {domain: [d for d in documents if d.domain == domain] for domain in ("code", "docs", "reference")}
    assert all(sum(len(d.text) for d in group) > 50_000 for group in by_domain.values())
    # Comments are left aside: an author may well repeat a docstring in one, and then it does stand in the file twice.
    code = {d.source: "\n".join(line for line in d.text.splitlines() if not line.lstrip().startswith("#")) for d in by_domain["code"]}
    checked = 0
    for reference in by_domain["reference"]:
        module = code.get(reference.source.removesuffix("#docstrings"))
        for paragraph in reference.text.split("\n\n")[1:4]:
            line = paragraph.splitlines()[-1].strip()
            if module is not None and len(line) > 60:
                checked += 1
                assert line not in module, f"{line!r} of {reference.source} is in the code as well"
    assert checked > 10
    assert read_all(source)[:20] == read_all(source)[:20]


@pytest.mark.parametrize("target", [1, 40, 333, 5000])
def test_every_line_of_a_split_file_is_in_exactly_one_piece(target: int, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {i} " + "x" * (i * 7 % 90)}) for i in range(200)]
    path = tmp_path / "big.jsonl"
    path.write_text("\n".join(lines))  # without a last line end
    source = JsonlFiles(JsonlSource(kind="jsonl", path=str(path)))
    items = source.items(target)
    assert len(items) >= path.stat().st_size // target // 2 and sum(item.size for item in items) == path.stat().st_size
    found = [d for item in items for d in source.read(item)]
    assert [json.dumps({"text": d.text}) for d in found] == lines
    assert len({d.source for d in found}) == 200
    data = path.read_bytes()
    for d in found[::17]:
        offset = int(d.source.rpartition("@")[2])
        assert json.loads(data[offset:].split(b"\n")[0])["text"] == d.text, "the offset is where the document is"


def test_tables_are_split_by_their_groups_and_keep_their_row_numbers(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {i} " + "y" * 300 for i in range(1000)], "year": list(range(1000))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100, compression="none")
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=100):
            writer.write_batch(batch)
    with pa.OSFile(str(tmp_path / "s.arrows"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    sources: list[Source] = [
        ParquetFiles(ParquetSource(kind="parquet", path=str(tmp_path / "t.parquet"))),
        ArrowFiles(ArrowSource(kind="arrow", path=str(tmp_path / "t.arrow"))),
        ArrowFiles(ArrowSource(kind="arrow", path=str(tmp_path / "s.arrows"))),
    ]
    for source in sources:
        items = source.items(60_000)
        found = [d for item in items for d in source.read(item)]
        assert [(d.text, d.meta["year"]) for d in found] == [(f"row {i} " + "y" * 300, i) for i in range(1000)]
        assert found[777].source.endswith("@777")
        assert len(items) > 3 or source is sources[2]


def test_a_table_of_another_schema_among_many_costs_itself_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    found = read_all(ParquetFiles(ParquetSource(kind="parquet", path=str(tmp_path))))
    assert [d.dropped for d in found] == ["", "wrong_schema", "wrong_schema", "damaged_file"]


def test_utf16_text_is_read_by_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größer".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes("größer".encode())
    assert [d.text for d in read_all(TextFiles(TextSource(kind="text", path=str(tmp_path))))] == ["größer", "größer"]


def test_addresses_are_read_through_fsspec_from_a_real_server(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="needs the curation extra")
    pytest.importorskip("aiohttp")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "over the wire"}\n'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.jsonl.gz"
        assert [d.text for d in read_all(JsonlFiles(JsonlSource(kind="jsonl", path=url)))] == ["over the wire"]
        with pytest.raises(UserError, match=r"there is nothing here|could not be listed"):
            read_all(JsonlFiles(JsonlSource(kind="jsonl", path=url.replace("a.jsonl", "b.jsonl"))))
        server.shutdown()
    with pytest.raises(UserError, match="Install the package that opens nosuch://"):
        read_all(JsonlFiles(JsonlSource(kind="jsonl", path="nosuch://bucket/x.jsonl")))


def test_a_bucket_is_listed_read_and_split(s3: Any) -> None:
    s3.mkdir("corpus")
    rows = [f"row {i} " + "z" * 200 for i in range(300)]
    s3.pipe("corpus/in/plain.jsonl", "".join(json.dumps({"text": r}) + "\n" for r in rows).encode())
    s3.pipe("corpus/in/packed.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "packed"}\n'))
    source = JsonlFiles(JsonlSource(kind="jsonl", path="s3://corpus/in"))
    items = source.items(20_000)
    found = [d for item in items for d in source.read(item)]
    assert len(items) > 3 and all(item.stamp for item in items)
    assert [d.text for d in found] == ["packed", *rows]
    assert found[0].source == "s3://corpus/in/packed.jsonl.zst@0"


def test_megatron_datasets_are_written_read_and_understood_by_megatron(corpus: Corpus, tmp_path: Path) -> None:
    written = export_megatron(corpus, tmp_path / "out")
    assert sum(written.values()) == sum(s["documents"] for by in corpus.manifest["splits"].values() for rows in by.values() for s in rows)
    config = MegatronSource(kind="megatron", path=str(tmp_path / "out/train"), tokenizer=str(corpus.folder / "tokenizer"))
    found = [d for item in MegatronFiles(config).items(10_000) for d in MegatronFiles(config).read(item)]
    assert len(MegatronFiles(config).items(10_000)) > 2
    expected = [corpus.tokenizer.decode(t[1:]) for domain in corpus.domains for s in corpus.shards("train", domain)
                for b in range(len(s.index.blocks)) for t in s.table(b).column("tokens").to_pylist()]  # fmt: skip
    assert sorted(d.text for d in found) == sorted(expected)
    (tmp_path / "out/train/prose.idx").write_bytes(b"no index")
    with pytest.raises(UserError, match=r"prose\.idx: not readable as Megatron"):
        MegatronFiles(config).items(10_000)
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs the megatron extra")
    theirs = indexed.IndexedDataset(str(tmp_path / "out/train/programs"))
    shard = corpus.shards("train", "programs")[0]
    tokens, offsets = shard.block(0)
    assert len(theirs) == written["train/programs"]
    assert theirs[0].tolist() == [*tokens[1 : offsets[1]].tolist(), corpus.tokenizer.end_of_text]


def test_a_saved_dataset_is_split_by_rows(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": [f"row {i}" * 20 for i in range(500)], "n": list(range(500))}).save_to_disk(str(tmp_path / "saved"))
    source = HubDataset(DatasetsSource(kind="datasets", path=str(tmp_path / "saved")))
    items = source.items(10_000)
    found = [d for item in items for d in source.read(item)]
    assert len(items) > 3 and [d.meta["n"] for d in found] == list(range(500)) and found[444].source.endswith("@444")
