"""Transforms keep what they promise to keep, and name the first rule that failed."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from regrowth.data_pipeline.document import DROPPED, Raw, to_batches
from regrowth.data_pipeline.transform_config import Quality
from regrowth.data_pipeline.transforms.base import append_lineage
from regrowth.data_pipeline.transforms.hashing import content_hashes, heldout_mask
from regrowth.data_pipeline.transforms.normalise import NormaliseText
from regrowth.data_pipeline.transforms.quality import QualityFilter


def batch_of(*texts: str) -> pa.RecordBatch:
    ((batch, _),) = to_batches([Raw(text, "d", f"s{i}") for i, text in enumerate(texts)], bytes_per_batch=1 << 30)
    return batch


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("null\x00 byte \x07 and\ufeff bom", "null byte  and bom"),
        ("e\u0301", "\u00e9"),
        ("x = 1   \n\n\n\n\n\ny", "x = 1\n\n\ny"),
        ("\tkept\tindent", "kept\tindent"),
        ("①", "①"),
    ],
)
def test_normalise_gives_equal_text_one_spelling(before: str, after: str) -> None:
    batch, dropped = NormaliseText()(batch_of(before))
    assert dropped is None
    assert batch.column("text").to_pylist() == [after]
    assert unicodedata.is_normalized("NFC", after)
    again, _ = NormaliseText()(batch)
    assert again.column("text").to_pylist() == [after], "normalising twice changes nothing"


def test_normalise_writes_its_lineage_and_level() -> None:
    batch, _ = NormaliseText()(batch_of("a", "b"))
    assert batch.column("lineage").to_pylist() == [["normalise@1"], ["normalise@1"]]
    assert batch.column("level").to_pylist() == [1, 1]
    chains = pa.array([["x"], [], ["y", "z"]], pa.list_(pa.string()))
    assert append_lineage(chains, "new").to_pylist() == [["x", "new"], ["new"], ["y", "z", "new"]]
    assert append_lineage(chains.slice(1), "new").to_pylist() == [["new"], ["y", "z", "new"]]


GOOD = "\n".join(f"This is line number {i} of a good document." for i in range(10))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("short", "too_short"),
        (GOOD * 20, "too_long"),
        (GOOD + "�" * 40, "not_utf8"),
        ("a" * 3000 + "\n" + GOOD, "long_line"),
        ("1234 5678 " * 40, "few_letters"),
        ("the same line again and again\n" * 30, "repeated_lines"),
    ],
)
def test_quality_names_the_rule_that_failed(text: str, reason: str) -> None:
    quality = QualityFilter(Quality(kind="quality", min_characters=50, max_characters=5000, max_line_characters=2000))
    kept, dropped = quality(batch_of(GOOD, text, GOOD))
    assert kept.column("text").to_pylist() == [GOOD, GOOD]
    assert dropped is not None and dropped.schema.equals(DROPPED)
    assert dropped.column("reason").to_pylist() == [reason]
    assert dropped.column("text").to_pylist() == [text], "what is dropped keeps its text"


def test_quality_agrees_with_a_slow_count_of_repeated_lines() -> None:
    rng = np.random.default_rng(0)
    texts = [
        "\n".join(rng.choice(["a line of some words", "another one", "", "third line here"], size=rng.integers(5, 40))) for _ in range(60)
    ]
    limit = 0.5
    quality = QualityFilter(Quality(kind="quality", min_characters=0, min_alphabetic_fraction=0, max_duplicate_line_fraction=limit))
    kept, _ = quality(batch_of(*texts))
    expected = []
    for text in texts:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if not lines or (len(lines) - len(set(lines))) / len(lines) <= limit:
            expected.append(text)
    assert kept.column("text").to_pylist() == expected


def test_fifty_megabytes_in_one_line_are_judged_without_trouble() -> None:
    huge = "x" * 50_000_000
    kept, dropped = QualityFilter(Quality(kind="quality"))(batch_of(GOOD, huge))
    assert len(kept) == 1
    assert dropped is not None and dropped.column("reason").to_pylist() == ["too_long"]


def test_the_held_out_split_depends_on_content_alone_and_takes_its_fraction() -> None:
    texts = pa.array([f"document {i}" for i in range(20_000)], pa.large_string())
    mask = heldout_mask(content_hashes(texts), 0.05)
    assert abs(mask.mean() - 0.05) < 0.006
    shuffled = np.random.default_rng(0).permutation(len(texts))
    assert (heldout_mask(content_hashes(texts.take(pa.array(shuffled))), 0.05) == mask[shuffled]).all()
