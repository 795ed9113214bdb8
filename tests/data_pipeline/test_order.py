"""Order: permutations are permutations, packing keeps every token once with its label, position and document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrowth.data_pipeline.batch import make_sample_id, split_sample_id
from regrowth.data_pipeline.order import key64, pack_block, permuted, sequences_in

END = 0


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_permuted_is_a_permutation_that_its_key_decides(count: int) -> None:
    first = [permuted(i, count, key=1) for i in range(count)]
    assert sorted(first) == list(range(count))
    if count >= 16:
        assert first != list(range(count)) and first != [permuted(i, count, key=2) for i in range(count)]


def test_permuted_spreads_evenly() -> None:
    """Over many keys each position goes everywhere equally often: chi-square of 8 x 8 cells, 49 degrees of freedom, 0.1% critical value 85.4."""
    counts = np.zeros((8, 8))
    for key in range(4000):
        for position in range(8):
            counts[position, permuted(position, 8, key64("k", key))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 85.4


def slow_pack(documents: list[list[int]], length: int) -> list[list[tuple[int, int, int, int]]]:
    """Packing by plain loops: (token, label, position, document within the sequence)."""
    flat = []
    for number, document in enumerate(documents):
        for i, token in enumerate(document):
            flat.append((token, document[i + 1] if i + 1 < len(document) else END, i, number))
    sequences = []
    for start in range(0, len(flat), length):
        part = flat[start : start + length]
        first_document, first_position = part[0][3], part[0][2]
        sequences.append(
            [(t, label, p - first_position if d == first_document else p, d - first_document) for t, label, p, d in part],
        )
    return sequences


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 33), st.integers(0, 2**63))
def test_packing_agrees_with_plain_loops(sizes: list[int], length: int, key: int) -> None:
    documents, next_token = [], 1
    for size in sizes:
        documents.append([END, *range(next_token, next_token + size - 1)])
        next_token += size
    tokens = np.array([t for d in documents for t in d], dtype=np.uint16)
    offsets = np.cumsum([0, *sizes])
    packed = pack_block(tokens, offsets, length, END, key)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(documents))
    expected = slow_pack([documents[i] for i in order], length)
    assert packed.tokens.shape == (sequences_in(len(tokens), length), length) == (len(expected), length)
    for row, sequence in enumerate(expected):
        real = len(sequence)
        got = zip(packed.tokens[row], packed.labels[row], packed.positions[row], packed.doc_ids[row], strict=True)
        assert [tuple(int(v) for v in values) for values in got][:real] == sequence
        assert (packed.loss_weight[row, :real] == 1).all() and (packed.loss_weight[row, real:] == 0).all()
        assert (packed.doc_ids[row, real:] == -1).all()
    assert packed.loss_weight.sum() == len(tokens)


def test_sample_ids_hold_their_parts() -> None:
    parts = (255, (1 << 15) - 1, (1 << 22) - 1, (1 << 18) - 1)
    assert split_sample_id(make_sample_id(*parts)) == parts
    assert make_sample_id(*parts) < 2**63
    with pytest.raises(OverflowError):
        make_sample_id(256, 0, 0, 0)
