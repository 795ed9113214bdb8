"""From documents to a corpus: nothing twice, nothing lost, nothing evaluated that was trained on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.phases.shard import domain_folder
from regrowth.data_pipeline.pipeline import corpus_folder
from regrowth.data_pipeline.prepare import prepare
from regrowth.errors import UserError
from tests.conftest import prose, small_data_values, write_jsonl


def rows_of(corpus: Corpus, split: str) -> dict[str, tuple[str, ...]]:
    """id -> the text of each document, decoded from its shard."""
    found = {}
    for domain in corpus.domains:
        for shard in corpus.shards(split, domain):
            for number in range(len(shard.index.blocks)):
                table = shard.table(number)
                for row in table.select(["id", "tokens"]).to_pylist():
                    found[row["id"]] = corpus.tokenizer.decode(row["tokens"][1:])
    return found


def test_every_document_is_in_one_split_with_its_text_unchanged(corpus: Corpus, documents: Path) -> None:
    expected = {json.loads(line)["text"].strip() for path in documents.glob("*.jsonl") for line in path.read_text().splitlines()}
    train, heldout = rows_of(corpus, "train"), rows_of(corpus, "heldout")
    assert not train.keys() & heldout.keys()
    assert not set(train.values()) & set(heldout.values())
    assert set(train.values()) | set(heldout.values()) == expected
    assert len(heldout) > 10


def test_a_document_is_framed_by_the_border_rule(corpus: Corpus) -> None:
    shard = corpus.shards("train", "prose")[0]
    tokens, offsets = shard.block(0)
    assert (tokens[offsets[:-1]] == corpus.tokenizer.end_of_text).all()
    assert (tokens == corpus.tokenizer.end_of_text).sum() == len(offsets) - 1


def test_duplicates_are_dropped_once_for_all_sources_and_kept_aside(tmp_path: Path) -> None:
    texts = [prose(i, 12) for i in range(60)]
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": t, "domain": "a"} for t in texts])
    write_jsonl(
        tmp_path / "in/b.jsonl", [{"text": t + "  \r\n", "domain": "b"} for t in texts[:20]] + [{"text": prose(999, 12), "domain": "b"}] * 3
    )
    corpus = prepare(DataConfig.model_validate(small_data_values(tmp_path / "in", tmp_path / "out")))
    everything = list(rows_of(corpus, "train").values()) + list(rows_of(corpus, "heldout").values())
    assert len(everything) == len(set(everything)) == 61
    dropped = pa.ipc.open_stream(pa.memory_map(str(corpus.folder / "dropped/3-shards-00000.arrow"))).read_all()
    assert dropped.num_rows == 22 and set(dropped["reason"].to_pylist()) == {"duplicate"}
    assert set(dropped["domain"].to_pylist()) == {"b"}, "the first of equals is kept"
    counts = {(d, t, r): n for d, t, r, n, _ in corpus.manifest["funnel"]}
    assert counts["b", "exact_dedup", "duplicate"] == 22 and counts["a", "exact_dedup", ""] == 60


def test_a_finished_corpus_is_opened_not_rebuilt_and_another_config_is_another_folder(corpus: Corpus, documents: Path) -> None:
    config = DataConfig.model_validate(corpus.manifest["config"])
    before = (corpus.folder / "corpus.json").stat().st_mtime_ns
    assert prepare(config).folder == corpus.folder
    assert (corpus.folder / "corpus.json").stat().st_mtime_ns == before
    assert corpus_folder(config.model_copy(update={"heldout_fraction": 0.2})) != corpus.folder
    assert corpus_folder(config.model_copy(update={"workers": 7})) == corpus.folder


def test_a_shard_that_was_removed_is_written_again_and_one_that_was_swapped_is_refused(documents: Path, tmp_path: Path) -> None:
    import shutil

    config = DataConfig.model_validate(small_data_values(documents, tmp_path))
    corpus = prepare(config)
    before = rows_of(corpus, "train")
    shutil.rmtree(corpus.folder / "train/prose")
    assert rows_of(prepare(config), "train") == before
    for suffix in ("arrow", "json"):
        shutil.copy(corpus.folder / f"heldout/prose/00000-000.{suffix}", corpus.folder / f"train/prose/00000-000.{suffix}")
    with pytest.raises(UserError, match=r"not the shard that .*corpus.json lists"):
        corpus.shards("train", "prose")


def test_two_workers_write_what_one_writes(documents: Path, tmp_path: Path, corpus: Corpus) -> None:
    two = prepare(DataConfig.model_validate({**small_data_values(documents, tmp_path), "workers": 2}))
    assert two.folder.name == corpus.folder.name
    assert {k: v for k, v in two.manifest.items() if k != "config"} == {k: v for k, v in corpus.manifest.items() if k != "config"}


KILLED = """
import json, sys, time
from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.phases.curate import CuratePhase
from regrowth.data_pipeline.prepare import prepare
real = CuratePhase.run_task
def slow(*a):
    real(*a); time.sleep(0.25)
CuratePhase.run_task = slow
prepare(DataConfig.model_validate(json.loads(sys.argv[1])))
"""


def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path) -> None:
    for i in range(12):
        write_jsonl(tmp_path / f"in/f{i:02d}.jsonl", [{"text": prose(100 * i + j, 15), "domain": "p"} for j in range(15)])
    values = small_data_values(tmp_path / "in", tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(values)])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*/phases/0-curate/part-*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/phases/0-curate/part-*.json")}
    assert 4 <= len(done) < 12
    corpus = prepare(DataConfig.model_validate(values))
    assert all(path.stat().st_mtime_ns == before for path, before in done.items()), "what was done is not done again"
    reference = prepare(DataConfig.model_validate({**values, "out": str(tmp_path / "clean")}))
    assert corpus.manifest["splits"] == reference.manifest["splits"]


def test_an_empty_corpus_and_a_wholly_dropped_one_are_refused_with_the_reasons(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "empty/e.jsonl", [])
    with pytest.raises(UserError, match="no document was found"):
        prepare(DataConfig.model_validate(small_data_values(tmp_path / "empty", tmp_path / "o1")))
    write_jsonl(tmp_path / "bad/b.jsonl", [{"text": "tiny"}] * 7 + [{"text": "1 2 3 4 " * 50}] * 2)
    with pytest.raises(UserError, match=r"every document was dropped: quality: too_short \(7\), quality: few_letters \(2\)"):
        prepare(DataConfig.model_validate(small_data_values(tmp_path / "bad", tmp_path / "o2")))


def test_odd_bytes_lose_no_other_document(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = [prose(i, 15) for i in range(40)]
    for i, text in enumerate(good):
        (folder / f"good{i}.txt").write_text(text)
    (folder / "latin.txt").write_bytes(("naïve café " * 60).encode("latin-1"))
    (folder / "nulls.txt").write_bytes(prose(77, 15).replace(" ", "\0 ").encode())
    (folder / "one_line.txt").write_bytes(b"y" * 50_000_000)
    values = {**small_data_values(folder, tmp_path / "out"), "sources": [{"kind": "text", "path": str(folder)}]}
    corpus = prepare(DataConfig.model_validate(values))
    texts = set(rows_of(corpus, "train").values()) | set(rows_of(corpus, "heldout").values())
    assert set(good) <= texts and prose(77, 15) in texts
    reasons = {(t, r): n for _, t, r, n, _ in corpus.manifest["funnel"] if r}
    assert reasons == {("quality", "not_utf8"): 1, ("quality", "too_long"): 1}


def test_domain_names_become_safe_folders_and_stay_apart() -> None:
    names = ["code", "a/b", "a_b", "..", ".hidden", "", "a b", "ü"]
    folders = [domain_folder(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in f and f not in (".", "..", "") for f in folders)


def test_real_text_of_twelve_domains_is_curated(shared_data: Path, tmp_path: Path) -> None:
    values = {**small_data_values(shared_data / "corpora", tmp_path), "tokenizer": {"vocabulary": 1024, "sample_megabytes": 1.0}}
    values["sources"] = [{"kind": "jsonl", "path": str(shared_data / "corpora"), "max_megabytes": 0.15}]
    corpus = prepare(DataConfig.model_validate(values))
    assert len(corpus.domains) == 12 and corpus.verify() >= 12


def test_the_shipped_data_recipes_are_valid_and_found_by_name() -> None:
    from regrowth.data_pipeline.config import DataRecipe
    from regrowth.settings import find_recipe, load, recipe_folder

    found = sorted((recipe_folder() / "data").glob("*.toml"))
    assert found
    for path in found:
        assert find_recipe(path.stem) == path
        assert load(DataRecipe, path).data.sources
