"""The fast encoder is taken only when it proves itself, and is watched ever after."""

from pathlib import Path

import numpy as np
import pytest

from regrowth.data_pipeline import encoder as e
from regrowth.data_pipeline.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from regrowth.errors import RunFailed, UserError
from tests.conftest import program, prose


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [prose(i, 20) for i in range(100)] + [program(i, 9) for i in range(50)]
    return train_tokenizer(iter(texts), 600, tmp_path_factory.mktemp("tokenizer"))


def fast(tokenizer: Tokenizer) -> e.FastEncoder:
    pytest.importorskip("fastokens", reason="needs the curation extra")
    return e.FastEncoder(tokenizer)


def test_both_encoders_give_the_same_ids_even_for_texts_that_spell_special_tokens(tokenizer: Tokenizer) -> None:
    texts = [prose(i, 5) for i in range(30)] + [f"a {END_OF_TEXT} b", END_OF_TEXT, "", "ünï 日本 🇫🇷", f"{END_OF_TEXT}{END_OF_TEXT}x"]
    ids, offsets = fast(tokenizer).encode(texts)
    expected, borders = e.ReferenceEncoder(tokenizer).encode(texts)
    assert np.array_equal(ids, expected) and np.array_equal(offsets, borders)
    assert (ids[offsets[:-1]] == tokenizer.end_of_text).all() and (ids == tokenizer.end_of_text).sum() == len(texts)


def test_the_choice_is_told_with_its_reason(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastokens", reason="needs the curation extra")
    name, reason = e.choose_engine(tokenizer, [prose(1, 5)], "auto")
    assert name == "fastokens" and reason.startswith("identical ids on")
    assert e.choose_engine(tokenizer, [], "tokenizers") == ("tokenizers", "asked for")

    # An encoder that is wrong about one hard text is found out.
    real = e.FastEncoder.encode

    def wrong(self: e.FastEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = real(self, texts)
        ids = ids.copy()
        ids[-1] ^= 1
        return ids, offsets

    monkeypatch.setattr(e.FastEncoder, "encode", wrong)
    name, reason = e.choose_engine(tokenizer, [prose(1, 5)], "auto")
    assert name == "tokenizers" and "gives other ids" in reason
    with pytest.raises(UserError, match="gives other ids"):
        e.choose_engine(tokenizer, [prose(1, 5)], "fastokens")


def test_a_disagreement_later_on_stops_the_task(tokenizer: Tokenizer) -> None:
    encoder = fast(tokenizer)

    class Liar:
        def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
            return np.zeros(len(texts), np.uint32).tobytes(), np.arange(len(texts) + 1, dtype=np.uint64).tobytes()

    encoder._backend = Liar()
    with pytest.raises(RunFailed, match=r'data\.tokenizer\.engine="tokenizers"'):
        encoder.encode([prose(1, 5)])


def test_without_the_fast_engine_the_reference_is_taken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fastokens", None)
    name, reason = e.choose_engine(tokenizer, [], "auto")
    assert name == "tokenizers" and "not installed" in reason
