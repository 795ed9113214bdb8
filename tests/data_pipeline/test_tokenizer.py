"""The tokenizer is reversible on any text and knows the bytes of every token."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from regrowth.errors import UserError
from regrowth.pretrain.ngram import to_bytes


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_text_comes_back_and_its_bytes_are_counted_exactly(corpus: Corpus, text: str) -> None:
    tokenizer = corpus.tokenizer
    ids = tokenizer.encode_documents([text])[0]
    assert ids[0] == tokenizer.end_of_text and tokenizer.end_of_text not in ids[1:]
    assert b"".join(tokenizer.pieces[i] for i in ids) == text.encode()
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert to_bytes(np.array(ids), tokenizer).tobytes() == b"\0" + text.encode()
    assert tokenizer.decode(ids[1:]) == text


def test_text_that_spells_a_special_token_is_text(corpus: Corpus) -> None:
    ids = corpus.tokenizer.encode_documents([f"before {END_OF_TEXT} after"])[0]
    assert ids.count(corpus.tokenizer.end_of_text) == 1


def test_the_table_travels_with_the_tokenizer(corpus: Corpus) -> None:
    stored = np.load(corpus.folder / "tokenizer/bytes_per_token.npy", allow_pickle=False)
    assert (stored == corpus.tokenizer.bytes_per_token).all()


def test_training_is_deterministic_and_gives_the_size_asked_for(tmp_path: Path) -> None:
    texts = [f"the words of text number {i} are words and words again" for i in range(300)]
    first, second = (train_tokenizer(iter(texts), 300, tmp_path / name) for name in "ab")
    assert first.size == 300 and first.hash == second.hash


def test_a_wrong_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no tokenizer here"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
