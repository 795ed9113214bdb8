"""Keeping the best: the same documents as sorting everything would keep, whatever the groups and the ties, and whoever does the work."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.phases.keep_best import KEYS, find_lines, host_of, ordered, unordered
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.trace import trace
from regrowth.data_pipeline.transform_config import KeepBest
from regrowth.errors import UserError
from tests.conftest import prose, small_data_values, write_jsonl


def kept_by_sorting(keys: np.ndarray, config: KeepBest) -> np.ndarray:
    """The slow way: the documents of each group in order, taken while what was taken before weighs less than is wanted."""
    keep = np.zeros(len(keys), dtype=bool)
    names, sizes = np.unique(keys["group"], return_counts=True)
    if config.groups is not None:
        names = sorted(names, key=lambda name: (-sizes[np.searchsorted(np.unique(keys["group"]), name)], name))[: config.groups]
    for name in names:
        rows = np.flatnonzero(keys["group"] == name)
        wanted = config.documents if config.documents is not None else np.ceil(config.fraction * keys["weight"][rows].sum() - 1e-9)  # pyright: ignore[reportOptionalOperand]
        taken = 0
        for row in sorted(rows, key=lambda r: (keys["score"][r], keys["tie"][r]), reverse=True):
            if taken >= wanted or keys["score"][row] == 0:
                break
            keep[row] = True
            taken += 1 if config.documents is not None else keys["weight"][row]
    return keep


def stays(keys: np.ndarray, lines: np.ndarray) -> np.ndarray:
    line = lines[np.searchsorted(lines["group"], keys["group"])]
    above = (keys["score"] > line["score"]) | ((keys["score"] == line["score"]) & (keys["tie"] >= line["tie"]))
    return above & (keys["score"] > 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_radix_selection_keeps_what_sorting_keeps(data: Any) -> None:
    count = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    keys = np.zeros(count, KEYS)
    keys["group"] = rng.integers(0, data.draw(st.integers(1, 5)), count)
    levels = data.draw(st.sampled_from([1, 3, 1000]))  # many ties, or hardly any
    scores = rng.integers(0, levels, count).astype(np.float32) / np.float32(7) - np.float32(1)
    keys["score"] = ordered(np.where(rng.random(count) < 0.1, np.nan, scores))
    keys["tie"] = rng.permutation(count).astype(np.uint64) << np.uint64(data.draw(st.integers(0, 50)))
    by_documents = data.draw(st.booleans())
    keys["weight"] = 1 if by_documents else rng.integers(0, 50, count)
    measure = {"documents": data.draw(st.integers(1, 10))} if by_documents else {"fraction": data.draw(st.floats(0.01, 1.0))}
    config = KeepBest(kind="keep_best", score="quality", groups=data.draw(st.none() | st.integers(1, 4)), **measure)

    def read() -> Iterator[np.ndarray]:
        yield from np.array_split(keys, 3)

    lines, told = find_lines(read, config)
    np.testing.assert_array_equal(stays(keys, lines), kept_by_sorting(keys, config))
    assert told["documents"] == count


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_scores_keep_their_order_as_numbers(values: list[float]) -> None:
    scores = np.array(values, np.float32)
    keys = ordered(scores)
    np.testing.assert_array_equal(np.argsort(keys, kind="stable"), np.argsort(scores, kind="stable"))
    np.testing.assert_array_equal(unordered(keys), scores)
    assert keys.min() > 0 and ordered(np.array([np.nan]))[0] == 0


@pytest.mark.parametrize(
    ("meta", "host"),
    [
        ("{}", "web"),
        ('{"url": "https://A.example.org:80/x"}', "a.example.org"),
        ('{"url": "http://[broken"}', "web"),
        ('{"url": 3}', "web"),
    ],
)
def test_a_document_without_a_readable_address_competes_in_its_domain(meta: str, host: str) -> None:
    assert host_of(meta, "web") == host


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two domains of forty documents, of which each names its host; nothing is cleaned."""
    for domain in ("first", "second"):
        write_jsonl(
            folder / "raw" / f"{domain}.jsonl",
            [{"text": prose(100 * len(domain) + n, 30 + 3 * n), "url": f"http://h{n % 4}.org/{n}"} for n in range(40)],
        )
    transforms = [{"kind": "normalise"}, {"kind": "keep_best", "score": "random", **changes}]
    return {**small_data_values(folder / "raw", folder / "out"), "transforms": transforms}


def made(folder: Path, **changes: Any) -> tuple[Pipeline, dict[str, list[str]]]:
    """The corpus, and the ids of what is kept of each domain."""
    pipeline = Pipeline.open(prepare(DataConfig.model_validate(values(folder, **changes))).folder)
    kept: dict[str, list[str]] = {}
    assert pipeline.phases
    for part in pipeline.parts.present():
        for batch in pipeline.parts.kept(part):
            for domain, identity in zip(batch.column("domain").to_pylist(), batch.column("id").to_pylist(), strict=True):
                kept.setdefault(domain, []).append(identity)
    return pipeline, kept


def test_a_fraction_of_each_domain_by_characters(tmp_path: Path) -> None:
    pipeline, kept = made(tmp_path, fraction=0.25, per="domain")
    sizes: dict[str, dict[str, int]] = {"first": {}, "second": {}}
    for part in pipeline.parts.present():
        for _, batch in pipeline.parts.batches(part):
            for domain, identity, text in zip(*(batch.column(c).to_pylist() for c in ("domain", "id", "text")), strict=True):
                sizes[domain][identity] = len(text)
    for domain, documents in sizes.items():
        share = sum(documents[identity] for identity in kept[domain]) / sum(documents.values())
        assert 0.25 <= share < 0.25 + max(documents.values()) / sum(documents.values())
    funnel = pipeline.funnel()
    assert funnel[("first", "keep_best", "not_best")][0] == 40 - len(kept["first"])
    corpus = Corpus.open(pipeline.root)
    assert sum(row["documents"] for split in ("train", "heldout") for row in corpus.rows(split, "first")) == len(kept["first"])


def test_who_does_the_work_changes_nothing(tmp_path: Path) -> None:
    alone = made(tmp_path / "a", fraction=0.3)[1]
    parts = DataConfig.model_validate({**values(tmp_path / "b", fraction=0.3), "workers": 2, "item_megabytes": 0.01})
    pipeline = Pipeline.open(prepare(parts).folder)
    assert len(pipeline.items) > 2 and pipeline.phases
    texts = lambda p: sorted(t for part in p.parts.present() for b in p.parts.kept(part) for t in b.column("text").to_pylist())  # noqa: E731
    other = Pipeline.open(prepare(DataConfig.model_validate(values(tmp_path / "a", fraction=0.3))).folder)
    assert other.phases and texts(other) == texts(pipeline) and alone


def test_so_many_documents_of_the_largest_hosts(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    hosts = ["big"] * 9 + ["middle"] * 6 + ["small"] * 3
    write_jsonl(folder / "web.jsonl", [{"text": prose(n, 40), "url": f"http://{host}.org/{n}"} for n, host in enumerate(hosts)])
    best = {"kind": "keep_best", "score": "random", "per": "host", "documents": 4, "groups": 2}
    data = {**small_data_values(tmp_path / "raw", tmp_path / "out"), "transforms": [{"kind": "normalise"}, best], "heldout_fraction": 0.3}
    pipeline = Pipeline.open(prepare(DataConfig.model_validate(data)).folder)
    assert pipeline.phases
    found = [
        json.loads(meta)["url"]
        for part in pipeline.parts.present()
        for b in pipeline.parts.kept(part)
        for meta in b.column("meta").to_pylist()
    ]
    assert sorted(url.split("/")[2] for url in found) == ["big.org"] * 4 + ["middle.org"] * 4


def test_another_seed_keeps_others_at_random(tmp_path: Path) -> None:
    first, second = (set(made(tmp_path / str(seed), fraction=0.3, seed=seed)[1]["first"]) for seed in (0, 1))
    # Ids name places; the two folders differ. The place's own number does not.
    assert len(first) and len(second)
    texts = []
    for seed in (0, 1):
        pipeline = Pipeline.open(prepare(DataConfig.model_validate(values(tmp_path / str(seed), fraction=0.3, seed=seed))).folder)
        assert pipeline.phases
        texts.append({t for part in pipeline.parts.present() for b in pipeline.parts.kept(part) for t in b.column("text").to_pylist()})
    assert texts[0] != texts[1]


def test_copies_of_a_text_do_not_all_stay(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw" / "web.jsonl", [{"text": prose(n % 5, 40)} for n in range(100)])
    best = {"kind": "keep_best", "score": "random", "documents": 30}
    values = {**small_data_values(tmp_path / "raw", tmp_path / "out"), "transforms": [{"kind": "normalise"}, best], "heldout_fraction": 0.4}
    pipeline = Pipeline.open(prepare(DataConfig.model_validate(values)).folder)
    assert pipeline.phases and sum(len(b) for part in pipeline.parts.present() for b in pipeline.parts.kept(part)) == 30


def test_a_score_that_no_document_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score = quality: no document has this score"):
        made(tmp_path, score="quality", fraction=0.3)


def test_either_a_fraction_or_a_number_of_documents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either by fraction or by documents"):
        made(tmp_path, fraction=0.3, documents=2)


def test_duplicates_are_not_counted_and_a_trace_says_why_a_document_went(tmp_path: Path) -> None:
    rows = [{"text": prose(n, 40)} for n in range(20)]
    write_jsonl(tmp_path / "raw" / "web.jsonl", rows + rows)
    best = {"kind": "keep_best", "score": "random", "fraction": 0.5, "of": "documents"}
    data = {
        **small_data_values(tmp_path / "raw", tmp_path / "out"),
        "transforms": [{"kind": "normalise"}, {"kind": "exact_dedup"}, best],
        "heldout_fraction": 0.3,
    }
    pipeline = Pipeline.open(prepare(DataConfig.model_validate(data)).folder)
    assert pipeline.funnel()[("web", "exact_dedup", "duplicate")][0] == 20
    assert pipeline.funnel()[("web", "keep_best", "not_best")][0] == 10
    dropped = [pa.ipc.open_stream(path).read_all() for path in sorted((pipeline.root / "dropped").glob("*.arrow"))]
    gone = next(row for table in dropped for row in table.to_pylist() if row["reason"] == "not_best")
    assert any("left out" in step for step in trace(pipeline, gone["id"]).steps)
