"""Tables over all of Unicode that the kernels look characters up in, and the decoding of UTF-8."""

import sys
import unicodedata
from functools import cache

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.text.jit import jit

SPACE, ALPHA, DIGIT, SYMBOL, UPPER, LOWER, EDGE, TERMINAL = (np.uint8(1 << bit) for bit in range(8))

# Symbols that are no word on their own, beside Unicode's punctuation and controls.
_SYMBOLS = "$+<=>^`|~"
# What stands alone at the edge of a word: brackets, quotation marks, currencies and pictures (by category) and these.
_EDGES = ",:;!?_#*&·%§=—–<>"
_NOT_EDGES = "-/\\@.'’‐‑‒―"  # dots, hyphens and apostrophes have rules of their own


@cache
def character_classes() -> np.ndarray:
    """uint8 [0x110000]: the class bits of every code point."""
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        category = unicodedata.category(character)
        if category in ("Cn", "Co", "Cs"):
            continue
        bits = 0
        if character.isspace():
            bits |= SPACE
        if character.isalpha():
            bits |= ALPHA
        if category == "Nd":
            bits |= DIGIT
        if category[0] == "P" or category == "Cc" or character in _SYMBOLS:
            bits |= SYMBOL
        if category in ("Lu", "Lt"):
            bits |= UPPER
        elif category == "Ll":
            bits |= LOWER
        elif category in ("Lo", "Lm"):
            bits |= UPPER | LOWER  # scripts without case pass for either
        if character in _EDGES or (category in ("Ps", "Pe", "Pi", "Pf", "Po", "Sc", "So") and character not in _NOT_EDGES):
            bits |= EDGE
        if character in "'’‘“”\"`":
            bits |= EDGE
        table[point] = bits
    for point in _terminals():
        table[point] |= TERMINAL
    return table


def _terminals() -> list[int]:
    """Sentence-ending marks: those whose Unicode name says so."""
    ends = ("FULL STOP", "QUESTION MARK", "EXCLAMATION MARK", "DANDA", "INTERROBANG", "DOUBLE EXCLAMATION")
    not_ends = (
        "INVERTED",
        "SUPERSCRIPT",
        "ORNAMENT",
        "TAG ",
        "DINGBAT",
        "HEAVY",
        "PRESENTATION FORM FOR VERTICAL",
        "CIRCLED",
        "DIGIT",
        "NUMBER",
        "SYMBOL",
    )
    found = []
    for point in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(point), "")
        if any(end in name for end in ends) and not any(other in name for other in not_ends):
            found.append(point)
    return found


SEPARATOR, DROPPED = np.uint32(0), np.uint32(0xFFFFFFFF)
_ALONE = np.uint32(1 << 24)  # set on characters that are a word each (scripts written without spaces)


@cache
def folds() -> np.ndarray:
    """uint32 [0x110000]: what each code point counts as when texts are compared loosely.

    0 separates words (space, punctuation, symbols); DROPPED is passed over (combining marks); digits are all "0"; letters are lower case
    without diacritics; bit 24 marks characters that are a word each (Han, Kana, Thai, Lao, Khmer, Burmese).
    """
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint32)
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        category = unicodedata.category(character)
        if category == "Mn":
            table[point] = DROPPED
        elif category == "Nd":
            table[point] = ord("0")
        elif category[0] in "LN" or category == "Mc":
            lowered = character.lower()
            base = unicodedata.normalize("NFD", lowered)[0] if not 0xAC00 <= point <= 0xD7A3 else character
            table[point] = ord(base) | (_ALONE if _written_without_spaces(point) else 0)
    return table


def _written_without_spaces(point: int) -> bool:
    ranges = (
        (0x0E00, 0x0EFF),
        (0x1000, 0x109F),
        (0x1780, 0x17FF),
        (0x3040, 0x30FF),
        (0x3400, 0x9FFF),
        (0xF900, 0xFAFF),
        (0x20000, 0x3FFFF),
    )
    return any(low <= point <= high for low, high in ranges)


def buffers(texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 bytes of a text array and where each text starts (int64 [n + 1]), without a copy."""
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64, count=len(texts) + 1, offset=8 * texts.offset) if offsets else np.zeros(1, np.int64)
    return (np.frombuffer(data, dtype=np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)), starts


@jit
def decode(data, i):  # type: ignore[no-untyped-def]
    """The code point at byte `i` of valid UTF-8, and its length in bytes."""
    first = np.int64(data[i])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | (np.int64(data[i + 1]) & 0x3F), 2
    if first < 0xF0:
        return (first & 0x0F) << 12 | (np.int64(data[i + 1]) & 0x3F) << 6 | (np.int64(data[i + 2]) & 0x3F), 3
    point = (first & 0x07) << 18 | (np.int64(data[i + 1]) & 0x3F) << 12
    return point | (np.int64(data[i + 2]) & 0x3F) << 6 | (np.int64(data[i + 3]) & 0x3F), 4


@jit
def before(data, i):  # type: ignore[no-untyped-def]
    """The code point that ends just before byte `i`, and its length in bytes."""
    j = i - 1
    while np.int64(data[j]) & 0xC0 == 0x80:
        j -= 1
    point, _ = decode(data, j)
    return point, i - j


@jit
def count_characters(data, start, stop):  # type: ignore[no-untyped-def]
    """How many code points lie in a range of bytes."""
    count = 0
    for i in range(start, stop):
        count += (data[i] & 0xC0) != 0x80
    return count


@jit
def hash_bytes(data, start, stop):  # type: ignore[no-untyped-def]
    """A 64-bit hash of a range of bytes: eight at a time through a multiply-rotate mixer."""
    state = np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(stop - start)
    i = start
    while i + 8 <= stop:
        word = np.uint64(0)
        for k in range(8):
            word |= np.uint64(data[i + k]) << np.uint64(8 * k)
        state = mix(state ^ word)
        i += 8
    word = np.uint64(0)
    k = np.uint64(0)
    while i < stop:
        word |= np.uint64(data[i]) << k
        k += np.uint64(8)
        i += 1
    return mix(state ^ word)


@jit
def mix(value):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@jit
def longest_text(offsets):  # type: ignore[no-untyped-def]
    """Bytes of the longest text of a batch, at least 1: what a kernel's scratch arrays have to hold."""
    longest = 1
    for t in range(len(offsets) - 1):
        longest = max(longest, offsets[t + 1] - offsets[t])
    return longest
