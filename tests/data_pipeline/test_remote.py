"""Corpora at addresses: the same batches as from the disk, from a cache that heals, is bounded, and tells a corpus made anew from the one before."""

import os
from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline import remote
from regrowth.data_pipeline.config import DataConfig, LoaderConfig
from regrowth.data_pipeline.corpora import open_corpora
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.loader import Loader
from regrowth.data_pipeline.mixing.config import StaticMixing
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.reader import Cursor
from regrowth.data_pipeline.shards import DamagedShard
from regrowth.errors import RunFailed, UserError
from tests.conftest import small_data_values


@pytest.fixture(scope="module")
def uploaded(s3: Any, documents: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of one domain that is also at s3://corpora/more."""
    folder = tmp_path_factory.mktemp("uploaded")
    values = small_data_values(documents, folder) | {"tokenizer": {"path": str(corpus.folder / "tokenizer/tokenizer.json")}}
    values["sources"] = [{"kind": "jsonl", "path": str(documents / "prose.jsonl"), "domain": "more"}]
    made = prepare(DataConfig.model_validate(values))
    s3.mkdir("corpora")
    for path in made.folder.rglob("*"):
        if path.is_file():
            s3.pipe(f"corpora/more/{path.relative_to(made.folder)}", path.read_bytes())
    return made


def loader(corpus: Corpus, address: str, cache: Path, **more: Any) -> Loader:
    """A loader over the corpus and what is at an address."""
    config = LoaderConfig(sequence_length=64, global_batch=8, unit_sequences=2, corpora=[address], cache=cache, **more)
    return Loader(open_corpora(corpus.folder, config), config, StaticMixing())


def epoch_of(reader: Any) -> list[Any]:
    """Tokens and weights of an epoch."""
    from regrowth.data_pipeline.loader import assemble

    batch = assemble([reader] * (reader.index + 1), reader.take(Cursor(), reader.sequences), 64)
    return [batch.tokens.tolist(), batch.loss_weight.tolist()]


def test_batches_are_those_of_the_disk_and_the_cache_heals(corpus: Corpus, uploaded: Corpus, s3: Any, tmp_path: Path) -> None:
    local = loader(corpus, str(uploaded.folder), tmp_path / "cache")
    remote_ = loader(corpus, "s3://corpora/more", tmp_path / "cache")
    assert remote_.domains == local.domains == ["more", "programs", "prose"]
    assert [remote_.corpus.identity(d) for d in remote_.domains] == [local.corpus.identity(d) for d in local.domains]
    for step in range(40):
        ids = remote_.plan_step(step)
        assert ids == local.plan_step(step)
        assert (remote_.build(ids).tokens == local.build(ids).tokens).all()
        for one in (remote_, local):
            one.observe(step, {0: 1.0})
    index = remote_.domains.index("more")
    expected = epoch_of(local.readers[index])
    assert epoch_of(remote_.readers[index]) == expected
    blocks = sorted((tmp_path / "cache").rglob("*.bin"))
    assert len(blocks) == remote_.readers[index].blocks

    blocks[0].write_bytes(b"short")  # another process's file system lost its end
    assert epoch_of(loader(corpus, "s3://corpora/more", tmp_path / "cache").readers[index]) == expected
    altered = bytearray(blocks[1].read_bytes())
    altered[40] ^= 1
    blocks[1].write_bytes(bytes(altered))
    assert epoch_of(loader(corpus, "s3://corpora/more", tmp_path / "cache").readers[index]) == expected, "it heals"

    name = "corpora/more/train/more/00000-000.arrow"
    whole = s3.cat_file(name)
    block = uploaded.shards("train", "more")[0].index.blocks[1]
    s3.pipe(name, whole[: block.values_offset] + b"\xff" + whole[block.values_offset + 1 :])
    with pytest.raises(DamagedShard, match=r"s3://corpora/more/train/more/00000-000.arrow: damaged, the tokens of block 1"):
        epoch_of(loader(corpus, "s3://corpora/more", tmp_path / "other").readers[index])
    s3.pipe(name, whole)

    (shard,) = remote_.corpus.shards("train", "more")
    shard.verify()
    assert shard.table(0)["id"].to_pylist() == uploaded.shards("train", "more")[0].table(0)["id"].to_pylist()


def test_a_corpus_made_anew_is_not_mixed_with_what_is_kept_of_the_one_before(
    documents: Path, corpus: Corpus, uploaded: Corpus, s3: Any, tmp_path: Path
) -> None:
    values = small_data_values(documents, tmp_path / "anew") | {"tokenizer": {"path": str(corpus.folder / "tokenizer/tokenizer.json")}}
    values["sources"] = [{"kind": "jsonl", "path": str(documents / "programs.jsonl"), "domain": "more"}]
    anew = prepare(DataConfig.model_validate(values))
    for made in (uploaded, anew):
        for path in made.folder.rglob("*"):
            if path.is_file():
                s3.pipe(f"corpora/renewed/{path.relative_to(made.folder)}", path.read_bytes())
        ours, theirs = (loader(corpus, address, tmp_path / "cache") for address in ("s3://corpora/renewed", str(made.folder)))
        assert epoch_of(ours.readers[0]) == epoch_of(theirs.readers[0])


def test_the_cache_is_bounded(corpus: Corpus, uploaded: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_LOOK_EVERY", 2)
    bounded = loader(corpus, "s3://corpora/more", tmp_path / "cache", cache_gigabytes=30e3 / 1e9)
    reader = bounded.readers[0]
    for _ in range(3):
        epoch_of(reader)
    sizes = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin")]
    assert 0 < sum(sizes) <= 30e3 + 3 * max(sizes) and len(sizes) < reader.blocks
    (shard,) = bounded.corpus.shards("train", "more")
    shard.verify()
    assert list((tmp_path / "cache").rglob("*.arrow")), "a whole shard is kept too"
    for _ in range(3):
        epoch_of(reader)
    assert not list((tmp_path / "cache").rglob("*.arrow")), "and counts"


def test_what_is_not_there_or_cannot_be_fetched_is_told(
    corpus: Corpus, uploaded: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"s3://corpora/none/corpus.json: there is nothing there"):
        loader(corpus, "s3://corpora/none", tmp_path / "cache")
    with pytest.raises(UserError, match="Install the package that opens nosuch://"):
        loader(corpus, "nosuch://x", tmp_path / "cache")
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.001)
    there = loader(corpus, "s3://corpora/more", tmp_path / "cache")
    ids = there.readers[0].take(Cursor(), 1)
    monkeypatch.setattr(there.corpus.rows("train", "more")[0]["cache"].fs, "cat_file", _refuse)
    with pytest.raises(RunFailed, match=r"could not be fetched in 5 attempts \(ConnectionError: the network is down\)"):
        there.build(ids)


def _refuse(*_: Any, **__: Any) -> bytes:
    raise ConnectionError("the network is down")


def test_the_cache_folder_is_the_user_s_own_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remote.cache_root(None) == tmp_path / "regrowth/corpora" and remote.cache_root(Path("x")) == Path("x")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(remote.cache_root(None)).startswith(os.path.expanduser("~"))  # noqa: PTH111
