"""Counter-based randomness: a value is a function of (seed, purpose, step, name, global element index), never of who computes it.

So initialisation, growth noise and stochastic rounding are the same under every split of the model. The generator is splitmix64's finaliser
over key + index; normals come from Box-Muller in float64 and are rounded once, so that devices agree to the last bit but for their libm.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from regrowth.kernels.formats import pieces

_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_key(seed: int, purpose: str, step: int = 0, name: str = "") -> int:
    """The 64-bit key of one stream."""
    text = "\x1f".join((str(seed), purpose, str(step), name))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """64 random bits (int64) for each global element index (int64, any shape)."""
    return _finalise((index * _signed(_GOLDEN)).add_(_signed(key)))


def _finalise(bits: torch.Tensor) -> torch.Tensor:
    for (x,) in pieces(bits):
        x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_M1))
        x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_M2))
        x.bitwise_xor_(_shift_right(x, 31))
    return bits


@dataclass(frozen=True)
class Stream:
    """What an operand that is rounded by chance draws from: the key, and where its elements lie in the whole operand.

    Attributes:
        rows: int64 [R], the number of each row there.
        whole: its columns.
        first: the first column that is here.
    """

    key: int
    rows: torch.Tensor
    whole: int
    first: int = 0

    def bits(self, columns: int) -> torch.Tensor:
        """int32 [R, columns]."""
        return rounding_bits(self.key, self.rows, columns, self.whole, self.first)


def rounding_bits(key: int, rows: torch.Tensor, columns: int, whole: int | None = None, first: int = 0) -> torch.Tensor:
    """32 random bits (int32 [R, columns]) for each element of an operand: half of what `random_bits` gives for a pair of neighbours in a row, the lower half first.

    Args:
        rows: int64 [R], the number of each row in the whole operand.
        columns: that are here, of `whole`, from `first` on.
    """
    pairs = torch.arange(first // 2, (first + columns + 1) // 2, device=rows.device)
    begin = rows * (((whole or columns) + 1) // 2)
    # Each element's index times a constant, plus the key: of sums, in integers that wrap, the constant may be multiplied in before.
    bits = _finalise((begin * _signed(_GOLDEN)).add_(_signed(key))[:, None] + pairs * _signed(_GOLDEN)).view(torch.int32)
    return bits[:, first % 2 : first % 2 + columns]


def uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1), 53 bits, never 0."""
    return (_shift_right(random_bits(key, index), 11).double() + 0.5) * 2.0**-53


def normal(key: int, index: torch.Tensor) -> torch.Tensor:
    """Standard normals, float64: Box-Muller over two streams of the key."""
    first, second = uniform(key, index * 2), uniform(key, index * 2 + 1)
    return torch.sqrt(-2.0 * torch.log(first)) * torch.cos(2.0 * math.pi * second)


def global_index(shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """The global element index of each element of a whole tensor of `shape`."""
    return torch.arange(math.prod(shape), device=device).reshape(shape)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64 (torch's is arithmetic)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
