"""Deduplication: the right documents go, by the bands' formula, whoever does the work."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.text.characters import buffers, folds
from regrowth.data_pipeline.text.shingles import band_keys, hash_functions
from regrowth.errors import UserError
from tests.conftest import prose, small_data_values, write_jsonl


def band_hits(first: list[str], second: list[str], bands: int, rows: int) -> np.ndarray:
    functions = hash_functions(bands * rows, 1)
    keys = [band_keys(*buffers(pa.array(side, pa.large_string())), folds(), 5, *functions, bands, rows) for side in (first, second)]
    return (keys[0] == keys[1]).any(axis=0)


@pytest.mark.parametrize(
    ("similarity", "expected"), [(0.5, 0.0533), (0.6, 0.2111), (0.7, 0.5645), (0.75, 0.7716), (0.8, 0.9235), (0.85, 0.9884), (0.9, 0.9996)]
)
def test_pairs_share_a_band_as_often_as_the_published_curve_says(similarity: float, expected: float) -> None:
    """P = 1 - (1 - s^8)^14; 20,000 pairs, standard error at most .0036."""
    rng = np.random.default_rng(round(similarity * 100))
    shared = 120
    alone = round(shared * (1 - similarity) / (2 * similarity))  # J = shared / (shared + 2 alone)
    true = shared / (shared + 2 * alone)
    first, second = [], []
    for _ in range(20_000):
        draw = rng.integers(0, 1 << 40, shared + 4 + 2 * alone).astype("U")
        head = " ".join(draw[: shared + 4])  # shared + 4 words have `shared` 5-word shingles
        first.append(f"{head} {' '.join(draw[shared + 4 : shared + 4 + alone])}")
        second.append(f"{head} {' '.join(draw[shared + 4 + alone :])}")
    first = [text.translate(str.maketrans("0123456789", "abcdefghij")) for text in first]  # numbers all count as one
    second = [text.translate(str.maketrans("0123456789", "abcdefghij")) for text in second]
    formula = 1 - (1 - true**8) ** 14
    assert abs(formula - expected) < 0.06, "the pairs are where they should be"
    assert abs(band_hits(first, second, 14, 8).mean() - formula) < 0.01


def test_short_texts_have_no_signature() -> None:
    functions = hash_functions(8, 1)
    keys = band_keys(*buffers(pa.array(["a b c d", "a b c d e", ""], pa.large_string())), folds(), 5, *functions, 4, 2)
    assert (keys[:, 0] == 0).all() and (keys[:, 1] != 0).all() and (keys[:, 2] == 0).all()


def near_duplicates(folder: Path) -> dict[str, list[str]]:
    """Three clusters over two files, and loners. A variant has its last sentence changed."""
    clusters = {}
    rows = []
    for c in range(3):
        base = prose(500 + c, 40)
        variants = [base, base + " And one more sentence is here.", base[: -len(base) // 30]]
        clusters[str(c)] = variants
        rows += [{"text": v, "name": f"{c}{i}"} for i, v in enumerate(variants)]
    rows += [{"text": prose(i, 30), "name": f"alone{i}"} for i in range(60)]
    write_jsonl(folder / "a.jsonl", rows[::2])
    write_jsonl(folder / "b.jsonl", rows[1::2])
    return clusters


def corpus_texts(corpus: Corpus) -> set[str]:
    return {
        corpus.tokenizer.decode(tokens[1:])
        for split in ("train", "heldout")
        for domain in corpus.manifest["splits"][split]
        for shard in corpus.shards(split, domain)
        for number in range(len(shard.index.blocks))
        for tokens in shard.table(number).column("tokens").to_pylist()
    }


@pytest.mark.parametrize("keep", ["longest", "first"])
def test_one_document_of_each_cluster_is_kept_by_the_policy(keep: str, tmp_path: Path) -> None:
    clusters = near_duplicates(tmp_path / "in")
    values = {
        **small_data_values(tmp_path / "in", tmp_path / "out"),
        "transforms": [{"kind": "normalise"}, {"kind": "minhash_dedup", "keep": keep}],
    }
    corpus = prepare(DataConfig.model_validate(values))
    texts = corpus_texts(corpus)
    for variants in clusters.values():
        left = [v for v in variants if v.strip() in texts]
        assert len(left) == 1
        if keep == "longest":
            assert left[0] == max(variants, key=len)
    assert len(texts) == 63
    counts = {
        (t, r): sum(n for _, t2, r2, n, _ in corpus.manifest["funnel"] if (t2, r2) == (t, r)) for _, t, r, _, _ in corpus.manifest["funnel"]
    }
    assert counts["minhash_dedup", "near_duplicate"] == 6 and counts["minhash_dedup", ""] == 63


def test_exact_copies_never_take_their_cluster_with_them(tmp_path: Path) -> None:
    """The copy that exact dedup removes must not be the one that MinHash keeps."""
    base = prose(777, 40)
    texts = [base, base, base, base + " More.", *(prose(i, 30) for i in range(40))]
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": t} for t in texts])
    kinds = [{"kind": "exact_dedup"}, {"kind": "minhash_dedup", "keep": "first"}]
    corpus = prepare(DataConfig.model_validate({**small_data_values(tmp_path / "in", tmp_path / "out"), "transforms": kinds}))
    texts_left = corpus_texts(corpus)
    assert (base in texts_left) != (base + " More." in texts_left) and len(texts_left) == 41


def test_the_result_does_not_depend_on_how_the_keys_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near_duplicates(tmp_path / "in")
    values = {**small_data_values(tmp_path / "in", tmp_path / "one"), "transforms": [{"kind": "exact_dedup"}, {"kind": "minhash_dedup"}]}
    whole = prepare(DataConfig.model_validate(values))
    monkeypatch.setattr("regrowth.data_pipeline.phases.dedup._KEYS_PER_TASK", 7)
    divided = prepare(DataConfig.model_validate({**values, "out": str(tmp_path / "two")}))
    assert len(Pipeline.open(divided.folder).phases[2].task_sizes) > 14
    assert divided.manifest["splits"] == whole.manifest["splits"]


def test_signatures_of_other_settings_are_refused(tmp_path: Path) -> None:
    near_duplicates(tmp_path / "in")
    values = {**small_data_values(tmp_path / "in", tmp_path / "out"), "transforms": [{"kind": "minhash_dedup"}]}
    pipeline = Pipeline.plan_of(DataConfig.model_validate(values)).begin()
    for task in range(len(pipeline.phases[0].task_sizes)):
        pipeline.phases[0].run_task(task)
    pipeline.phases[0].settle(0)
    record = pipeline.phases[0].path(0, ".json")
    record.write_text(record.read_text().replace('"bands": 14', '"bands": 15'))
    with pytest.raises(UserError, match="Signatures of different settings cannot be compared"):
        pipeline.phases[1].run_task(0)


@pytest.mark.parametrize("filters", [1, 3])
def test_repeated_paragraphs_are_cut_and_their_first_occurrence_stays(filters: int, tmp_path: Path) -> None:
    footer = "This site is run by people who like long footers very much."
    texts = [f"{prose(i, 12)}\n\n{footer}\n\n{prose(1000 + i, 6)}" for i in range(50)]
    mostly = f"{footer}\n\ntiny tail of it"
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": t} for t in [*texts, mostly]])
    kinds = [{"kind": "normalise"}, {"kind": "line_dedup", "memory_megabytes": 1, "filters": filters, "max_removed_fraction": 0.7}]
    corpus = prepare(DataConfig.model_validate({**small_data_values(tmp_path / "in", tmp_path / "out"), "transforms": kinds}))
    left = corpus_texts(corpus)
    assert sum(footer in text for text in left) == 1 and texts[0] in left
    assert f"{prose(1, 12)}\n\n{prose(1001, 6)}" in left and len(left) == 50
    reasons = {(t, r): n for _, t, r, n, _ in corpus.manifest["funnel"] if r}
    assert reasons == {("line_dedup", "mostly_repeated"): 1}
    record = json.loads(next((corpus.folder / "phases").glob("*-line_dedup/part-00000.json")).read_text())
    assert record["false_positive_rate"] <= record["asked_rate"]


def test_a_bloom_filter_keeps_to_its_false_positive_rate() -> None:
    from regrowth.data_pipeline.text.lines import bloom_insert

    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 1 << 63, 200_000, dtype=np.uint64)
    probes = 7  # for 1%
    bits = np.zeros(int(200_000 * 9.6) // 64 + 1, dtype=np.uint64)
    seen = np.zeros(100_000, dtype=bool)
    bloom_insert(bits, hashes[:100_000], probes, seen)
    bloom_insert(bits, hashes[100_000:], probes, seen)
    assert seen.mean() < 0.012
    again = np.zeros(200_000, dtype=bool)
    assert bloom_insert(bits, hashes, probes, again) == 0 and again.all(), "what is in the filter is never new"


def test_an_over_full_filter_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/a.jsonl", [{"text": "\n\n".join(prose(50 * i + k, 2) for k in range(6))} for i in range(40)])
    kinds = [{"kind": "line_dedup", "memory_megabytes": 0.0001, "max_removed_fraction": 1.0}]
    corpus = prepare(DataConfig.model_validate({**small_data_values(tmp_path / "in", tmp_path / "out"), "transforms": kinds}))
    (note,) = corpus.manifest["notes"]
    assert "filter 0 is over-full" in note and "asked 1.00%" in note
