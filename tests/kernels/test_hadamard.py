"""Hadamard transforms: the matrix by its definition, orthogonal, and of no consequence to a product."""

import pytest
import torch

from regrowth.kernels.hadamard import hadamard, inverse_hadamard, random_signs
from regrowth.kernels.quantize import Quantizer
from regrowth.kernels.random import random_key


def sylvester(size: int) -> torch.Tensor:
    """H(2 n) = [[H, H], [H, -H]], entry (i, j) is the parity of i & j."""
    parity = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(parity, dtype=torch.float64) / size**0.5


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_it_is_the_product_with_sylvesters_matrix_and_has_an_inverse(size: int, signed: bool) -> None:
    x = torch.randn(3, 5, 2 * size, generator=torch.Generator().manual_seed(0))
    signs = random_signs(size, random_key(1, "signs")) if signed else None
    got = hadamard(x, size, signs)
    expected = (x.double().view(3, 5, 2, size) * (1.0 if signs is None else signs.double()) @ sylvester(size)).view(x.shape)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(inverse_hadamard(got, size, signs), x, rtol=0, atol=2e-6)


def test_a_product_along_the_transformed_dim_stays_what_it_was() -> None:
    a, b = torch.randn(2, 8, 64, dtype=torch.float64).unbind(0)
    signs = random_signs(16, 7)
    got = hadamard(a, 16, signs) @ hadamard(b, 16, signs).T
    torch.testing.assert_close(got.double(), a @ b.T, rtol=1e-5, atol=1e-5)


def test_an_outlier_is_spread_so_that_the_rest_of_its_block_survives_four_bits() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 60.0
    fp4 = Quantizer("e2m1", "block", 32, "ceil")
    plain = fp4.emulate(x)
    spread = inverse_hadamard(fp4.emulate(hadamard(x, 32)), 32)
    others = [i for i in range(32) if i != 3]
    assert (plain[:, others] == 0).float().mean() > 0.99, "below half of the smallest step"
    assert torch.cosine_similarity(spread[:, others].flatten(), x[:, others].flatten(), dim=0) > 0.2


def test_signs_are_drawn_evenly_and_by_their_key() -> None:
    signs = torch.cat([random_signs(32, random_key(0, "signs", step)) for step in range(200)])
    assert set(signs.tolist()) == {1.0, -1.0} and abs(signs.mean().item()) < 0.05
    assert torch.equal(random_signs(16, 5), random_signs(32, 5)[:16]) and not torch.equal(random_signs(32, 5), random_signs(32, 6))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a Hadamard transform of 32 does not fit a dim of 48"):
        hadamard(torch.ones(2, 48), 32)
    with pytest.raises(ValueError, match="of 24 does not fit"):
        hadamard(torch.ones(2, 48), 24)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "size"), [(128, 1024, 128), (32, 4096, 32), (96, 4096, 32), (64, 1, 64), (2048, 96, 16)])
def test_how_a_tensor_lies_in_memory_changes_no_bit(rows: int, columns: int, size: int, threads: int) -> None:
    """Also where there is one block, and where there are more values than a piece has."""
    x, before = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    signs = random_signs(size, 5)
    torch.set_num_threads(threads)
    try:
        wanted = hadamard(x.t().contiguous(), size, signs)
        apart = torch.stack((x, x), -1)[..., 0]  # every other value in memory
        for lying in (x.t(), apart.t(), x.repeat(1, 2)[:, :columns].t()):
            assert torch.equal(hadamard(lying, size, signs), wanted)
        three = torch.randn(3, columns, rows, generator=torch.Generator().manual_seed(2))
        assert torch.equal(hadamard(three.transpose(0, 1), size, signs), hadamard(three.transpose(0, 1).contiguous(), size, signs))
    finally:
        torch.set_num_threads(before)
