"""Order: permutations are permutations."""

import numpy as np
import pytest

from regrowth.data_pipeline.batch import make_sample_id, split_sample_id
from regrowth.data_pipeline.order import key64, permutation, permuted


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_permuted_is_a_permutation_that_its_key_decides(count: int) -> None:
    first = [permuted(i, count, key=1) for i in range(count)]
    assert sorted(first) == list(range(count))
    assert permutation(count, key=1).tolist() == first, "all at once is one by one"
    if count >= 16:
        assert first != list(range(count)) and first != [permuted(i, count, key=2) for i in range(count)]


def test_permuted_spreads_evenly() -> None:
    """Over many keys each position goes everywhere equally often: chi-square of 8 x 8 cells, 49 degrees of freedom, 0.1% critical value 85.4."""
    counts = np.zeros((8, 8))
    for key in range(4000):
        for position in range(8):
            counts[position, permuted(position, 8, key64("k", key))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 85.4


def test_sample_ids_hold_their_parts() -> None:
    parts = (255, (1 << 15) - 1, (1 << 22) - 1, (1 << 18) - 1)
    assert split_sample_id(make_sample_id(*parts)) == parts
    assert make_sample_id(*parts) < 2**63
    with pytest.raises(OverflowError):
        make_sample_id(256, 0, 0, 0)
