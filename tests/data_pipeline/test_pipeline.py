"""The plan and its phases on awkward ground: reopening, changed inputs, odd names, damaged tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.executors import cores
from regrowth.data_pipeline.phases.base import assigned
from regrowth.data_pipeline.phases.shard import domain_folder
from regrowth.data_pipeline.pipeline import Pipeline, corpus_folder
from regrowth.data_pipeline.prepare import prepare, reopened
from regrowth.data_pipeline.source_config import ArrowSource, JsonlSource, ParquetSource, TextSource
from regrowth.data_pipeline.sources.files import JsonlFiles, TextFiles
from regrowth.data_pipeline.sources.tables import ArrowFiles, ParquetFiles
from regrowth.data_pipeline.trace import survivors
from regrowth.errors import RunFailed, UserError
from tests.conftest import prose, small_data_values, write_jsonl


def values_of(tmp_path: Path, **more: object) -> dict:
    return {**small_data_values(tmp_path / "in", tmp_path / "out"), **more}


def write_documents(tmp_path: Path, files: int = 4) -> None:
    for f in range(files):
        write_jsonl(tmp_path / f"in/f{f}.jsonl", [{"text": prose(100 * f + i, 12), "domain": "p"} for i in range(30)])


def test_ranks_share_the_tasks_without_gap_or_overlap_and_evenly() -> None:
    sizes = [(7 * i) % 31 + 1 for i in range(100)]
    for world in (1, 3, 16, 150):
        shares = [assigned(sizes, list(range(100)), rank, world) for rank in range(world)]
        assert sorted(task for share in shares for task in share) == list(range(100))
        loads = [sum(sizes[task] for task in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)


def test_a_reopening_that_was_killed_half_way_is_finished_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path)
    config = DataConfig.model_validate(values_of(tmp_path))
    before = prepare(config).manifest["splits"]
    folder = corpus_folder(config)
    next((folder / "train/p").glob("*.arrow")).unlink()
    removed: list[Path] = []
    real = Path.unlink

    def dies(self: Path, missing_ok: bool = False) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(self)
        real(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            reopened(Pipeline.plan_of(config))
    assert prepare(config).manifest["splits"] == before


def test_after_retrying_failed_inputs_nothing_old_is_counted(tmp_path: Path) -> None:
    from regrowth.data_pipeline.phases.curate import CuratePhase

    write_documents(tmp_path)
    config = DataConfig.model_validate(values_of(tmp_path, executor={"max_failed": 1}, item_megabytes=0.01))
    real = CuratePhase.run
    with pytest.MonkeyPatch.context() as patch:

        def fails(self: CuratePhase, task: int) -> dict:
            if task == 0:
                raise RunFailed("for now")
            return real(self, task)

        patch.setattr(CuratePhase, "run", fails)
        prepare(config)
    corpus = prepare(config, retry_failed=True)
    survival = survivors(Pipeline.open(corpus.folder), str(tmp_path))
    assert len(survival.kept) == len({i for i, _, _ in survival.kept}) == 120 and not survival.dropped


def test_a_document_is_dropped_once_whatever_the_order_of_the_dedups(tmp_path: Path) -> None:
    base = prose(777, 40)
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": base}] * 10 + [{"text": prose(i, 30)} for i in range(40)])
    kinds = [{"kind": "minhash_dedup"}, {"kind": "exact_dedup"}]
    corpus = prepare(DataConfig.model_validate(values_of(tmp_path, transforms=kinds)))
    survival = survivors(Pipeline.open(corpus.folder), "/")
    assert len(survival.kept) == 41 and dict(survival.dropped) == {"minhash_dedup: near_duplicate": 9}


def test_settings_of_who_does_the_work_reach_the_workers(tmp_path: Path) -> None:
    write_documents(tmp_path)
    first = Pipeline.plan_of(DataConfig.model_validate(values_of(tmp_path))).begin()
    again = Pipeline.plan_of(DataConfig.model_validate(values_of(tmp_path, executor={"max_failed": 5}, workers=9))).begin()
    assert first.root == again.root
    assert Pipeline.open(again.root).config.executor.max_failed == 5 and Pipeline.open(again.root).config.workers == 9


@pytest.mark.parametrize(("given", "wanted"), [(None, True), ("", True), ("abc", False)])
@pytest.mark.parametrize("first", ["", "import torch;"])
def test_models_of_processes_side_by_side_take_their_share_of_the_cores(given: str | None, wanted: bool, first: str) -> None:
    """One thread, because MKL takes no more than there are cores; beside as many as torch takes by itself, where somebody set OMP_NUM_THREADS."""
    program = f"""{first}
from regrowth.data_pipeline.executors.cores import keep_to_share, share_cores
share_cores(0)
keep_to_share()
import os, torch
print(torch.get_num_threads(), "OMP_NUM_THREADS" in os.environ)"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | (
        {} if given is None else {"OMP_NUM_THREADS": given}
    )

    def told(program: str) -> list[str]:
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.split()

    threads, is_set = told(program)
    assert threads == ("1" if wanted else told("import torch; print(torch.get_num_threads())")[0])
    assert is_set == str(given is not None), "servers that it starts inherit nothing"


def test_the_share_of_the_cores_is_of_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cores_of_this_process", lambda: set(range(16)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert cores.usable_cores() == 16 and cores.share_beside([set(range(16))] * 8) == 2 and cores.share_beside([set(range(16))] * 99) == 1
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert cores.usable_cores() == 8 and cores.share_beside([set(range(16))] * 2) == 4
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8(x2)")
    monkeypatch.setattr(cores, "cores_of_this_process", lambda: {4, 5})
    assert cores.share_beside([{2 * n, 2 * n + 1} for n in range(8)]) == 2, "each is bound to its own"


def test_a_killed_plan_leaves_the_folder_usable_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    write_documents(tmp_path)
    named = tmp_path / "named"
    named.mkdir()
    (named / ".plan.json.partial-77-abc").write_text("{")
    config = DataConfig.model_validate(values_of(tmp_path, folder=str(named)))
    assert prepare(config).folder == named
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no plan"):
        Pipeline.plan_of(DataConfig.model_validate(values_of(tmp_path, folder=str(tmp_path / "other")))).begin()


def test_changed_models_and_evaluation_sets_make_another_corpus(tmp_path: Path) -> None:
    write_documents(tmp_path)
    write_jsonl(tmp_path / "evals/deep/a.jsonl", [{"query": prose(1, 3)}])
    (tmp_path / "words").write_text("one\n")
    kinds = [{"kind": "decontaminate", "path": str(tmp_path / "evals")}, {"kind": "blocked_words", "path": str(tmp_path / "words")}]
    folders = {corpus_folder(DataConfig.model_validate(values_of(tmp_path, transforms=kinds)))}
    write_jsonl(tmp_path / "evals/deep/a.jsonl", [{"query": prose(2, 3)}])
    os.utime(tmp_path / "evals/deep/a.jsonl", ns=(1, 1))
    folders.add(corpus_folder(DataConfig.model_validate(values_of(tmp_path, transforms=kinds))))
    (tmp_path / "words").write_text("two\n")
    folders.add(corpus_folder(DataConfig.model_validate(values_of(tmp_path, transforms=kinds))))
    assert len(folders) == 3


def test_odd_domains_and_file_names_come_through(tmp_path: Path) -> None:
    domains = ["news 13", "news\u2013", "a[/b]", "x" * 260, "ünï/..", "[red]"]
    assert len({domain_folder(d) for d in domains}) == len(domains) and all(len(domain_folder(d).encode()) < 200 for d in domains)
    rows = [{"text": prose(1000 * k + i, 12), "domain": d} for k, d in enumerate(domains) for i in range(15)]
    write_jsonl(tmp_path / "in/a.jsonl", rows)
    (tmp_path / "in/a.jsonl").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.jsonl"))  # not UTF-8
    corpus = prepare(DataConfig.model_validate(values_of(tmp_path)))
    assert set(corpus.domains) == set(domains) and corpus.verify() >= len(domains)
    from rich.console import Console

    from regrowth.launch.data import print_corpus

    with (tmp_path / "shown").open("w") as out:
        print_corpus(corpus, Console(file=out, width=200))
    assert "a[/b]" in (tmp_path / "shown").read_text() and "[red]" in (tmp_path / "shown").read_text()


def test_links_are_followed_once_and_dead_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.txt").write_text("a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "real")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    source = TextFiles(TextSource(kind="text", path=str(tmp_path / "in")))
    assert [d.text for item in source.items(1 << 20) for d in source.read(item)] == ["a"]
    (tmp_path / "in/dead.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="a link to nothing"):
        source.items(1 << 20)


def read(source: ParquetFiles | ArrowFiles | JsonlFiles) -> list[Raw]:
    return [d for item in source.items(1 << 20) for d in source.read(item)]


def test_damaged_tables_never_end_the_process_and_name_themselves(tmp_path: Path) -> None:
    table = pa.table({"text": ["some text"] * 50, "n": list(range(50))})
    with pa.OSFile(str(tmp_path / "a.arrows"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / "a.arrows").read_bytes()
    for at in range(len(whole) - 1200, len(whole) - 20, 37):  # flipped bits in buffers and metadata
        data = bytearray(whole)
        data[at : at + 3] = bytes(b ^ 0xFF for b in data[at : at + 3])
        (tmp_path / "b.arrows").write_bytes(bytes(data))
        found = [d for item in ArrowFiles(ArrowSource(kind="arrow", path=str(tmp_path))).items(1 << 20) for d in
                 ArrowFiles(ArrowSource(kind="arrow", path=str(tmp_path))).read(item)]  # fmt: skip
        assert [d.text for d in found[:50]] == ["some text"] * 50
    (tmp_path / "b.arrows").unlink()
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "twice.arrows"), "wb") as sink, pa.ipc.new_stream(sink, twice.schema) as writer:
        writer.write_table(twice)
    assert [d.dropped for d in read(ArrowFiles(ArrowSource(kind="arrow", path=str(tmp_path))))][50:] == ["wrong_schema"]
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": bad}), tmp_path / "utf8.parquet")
    assert [d.dropped for d in read(ParquetFiles(ParquetSource(kind="parquet", path=str(tmp_path))))][50:] == ["damaged_file"]


def test_large_documents_of_tables_are_dropped_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["small", "x" * 3_000_000, "small"]}), tmp_path / "a.parquet")
    found = read(ParquetFiles(ParquetSource(kind="parquet", path=str(tmp_path), max_document_megabytes=1)))
    assert [d.dropped for d in found] == ["", "document_too_large", ""] and found[1].source.endswith("@1")


@pytest.mark.parametrize("packing", ["gz", "xz", "bz2", "zst"])
def test_every_whole_document_before_a_cut_is_kept(packing: str, tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma
    import random

    import zstandard

    rng = random.Random(0)
    rows = [json.dumps({"text": f"{i} " + "".join(rng.choices("abcdefghijklmnop ", k=400))}).encode() + b"\n" for i in range(5000)]
    pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.ZstdCompressor().compress}[packing]
    packed = pack(b"".join(rows))
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(packed[:-20])
    found = read(JsonlFiles(JsonlSource(kind="jsonl", path=str(path))))
    kept = [d for d in found if not d.dropped]
    assert found[-1].dropped == "damaged_file"
    assert len(kept) >= (4900 if packing in ("gz", "xz") else 2000), "bz2 and zstd give a block whole or not at all"
    path.write_bytes(packed)
    assert len(read(JsonlFiles(JsonlSource(kind="jsonl", path=str(path))))) == 5000


def test_a_zstd_bomb_is_left_in_bounded_memory(tmp_path: Path) -> None:
    import subprocess
    import sys

    import zstandard

    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    with (tmp_path / "bomb.jsonl.zst").open("wb") as out:
        for _ in range(900):
            out.write(compressor.compress(b" " * 1_000_000))
        out.write(compressor.flush())
    code = """
import re, sys
from pathlib import Path
from regrowth.data_pipeline.source_config import JsonlSource
from regrowth.data_pipeline.sources.files import JsonlFiles
source = JsonlFiles(JsonlSource(kind="jsonl", path=sys.argv[1]))
print([d.dropped for item in source.items(1 << 20) for d in source.read(item)])
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "bomb.jsonl.zst")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    reasons, resident = done.stdout.splitlines()
    assert "damaged_file" in reasons and int(resident) < 500_000, done.stdout
