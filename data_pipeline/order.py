"""The order in which a domain's tokens are read: blocks and the sequences in them, permuted by a keyed Feistel network.

Nothing here keeps state or memory in proportion to the corpus: sequence number k of an epoch is computed, not remembered.
"""

import hashlib

import numpy as np


def key64(*parts: object) -> int:
    """A 64-bit key from any printable parts; the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(_joined(parts), digest_size=8).digest(), "little")


def _joined(parts: tuple[object, ...]) -> bytes:
    return "\x1f".join(str(part) for part in parts).encode()


_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31 = (np.uint64(bits) for bits in (11, 27, 30, 31))


def uniforms(count: int, *parts: object) -> np.ndarray:
    """float64 [count] in [0, 1): number i depends on the parts and on i alone, the same on every machine (53 bits of SHAKE-128's output each)."""
    words = hashlib.shake_128(_joined(parts)).digest(8 * count)
    return (np.frombuffer(words, dtype="<u8") >> _11) * 2.0**-53


def permuted(position: int, count: int, key: int, rounds: int = 6) -> int:
    """Where `position` of 0..count-1 goes under the permutation of `key`.

    A balanced Feistel network on the smallest even number of bits that holds `count`, walked until the value falls inside (cycle walking).
    """
    if not 0 <= position < count:
        raise IndexError(f"position {position} of {count}")
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for round_ in range(rounds):
            left, right = right, left ^ (_mix(right ^ (key + 0x9E3779B97F4A7C15 * (round_ + 1))) & mask)
        value = left << half | right
        if value < count:
            return value


def permutation(count: int, key: int, rounds: int = 6) -> np.ndarray:
    """int64 [count]: `permuted` of every position at once."""
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64((key + 0x9E3779B97F4A7C15 * (round_ + 1)) & 0xFFFFFFFFFFFFFFFF) for round_ in range(rounds)]
    value = np.arange(count, dtype=np.uint64)
    outside = np.arange(count)  # where the walk goes on
    while len(outside):
        left, right = value[outside] >> half, value[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        value[outside] = left << half | right
        outside = outside[value[outside] >= count]
    return value.astype(np.int64)


def _mixed(value: np.ndarray) -> np.ndarray:
    """`_mix` of uint64 [n]."""
    value = (value ^ value >> _30) * _FIRST
    value = (value ^ value >> _27) * _SECOND
    return value ^ value >> _31


def _mix(value: int) -> int:
    """splitmix64's finaliser."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
