"""Sources read what they say, and lose nothing silently: what cannot be used is dropped by name."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import DatasetsSource, InstalledSource, JsonlSource, ParquetSource, TextSource
from regrowth.data_pipeline.sources.base import Source
from regrowth.data_pipeline.sources.files import JsonlFiles, TextFiles
from regrowth.data_pipeline.sources.hub import HubDataset
from regrowth.data_pipeline.sources.installed import InstalledText
from regrowth.data_pipeline.sources.tables import ParquetFiles
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


def test_the_installation_gives_three_domains_of_real_text_and_no_docstring_twice() -> None:
    source = InstalledText(InstalledSource(kind="installed", max_megabytes=1.0))
    documents = [d for d in read_all(source) if not d.dropped]
    by_domain = {domain: [d for d in documents if d.domain == domain] for domain in ("code", "docs", "reference")}
    assert all(sum(len(d.text) for d in group) > 50_000 for group in by_domain.values())
    code = {d.source: d.text for d in by_domain["code"]}
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
