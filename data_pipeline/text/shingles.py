"""Shingles (runs of n words, compared loosely) and what is computed from them: MinHash band keys, overlaps with a set of n-grams.

A MinHash function is h_i(x) = (a_i x_low + c_i x_high + b_i) mod 2^32 over the two halves of a shingle's 64-bit hash, a_i and c_i odd: 32-bit
multiplications run eight at a time. Estimates are as good as those of a random permutation (tests hold recall to the bands' formula).
"""

import numpy as np

from regrowth.data_pipeline.text.characters import DROPPED, SEPARATOR, decode, longest_text, mix
from regrowth.data_pipeline.text.hashtable import slot
from regrowth.data_pipeline.text.jit import jit

_ALONE_BIT = np.uint32(1 << 24)


@jit
def _loose_words(data, start, stop, folds, keys):  # type: ignore[no-untyped-def]
    """Hashes of the words of a text, compared without case, diacritics, punctuation and numbers' values; returns how many."""
    count = 0
    state = np.uint64(0)
    inside = False
    digits = False
    i = start
    while i < stop:
        byte = data[i]
        if byte < 0x80:
            fold, size = folds[byte], 1
        else:
            point, size = decode(data, i)
            fold = folds[point]
        if digits and (byte == 46 or byte == 44) and i + 1 < stop and 48 <= data[i + 1] <= 57:
            i += 1  # 1,000 and 3.14 are one number
            continue
        if fold == SEPARATOR:
            if inside:
                keys[count] = mix(state)
                count += 1
            inside = digits = False
        elif fold & _ALONE_BIT and fold != DROPPED:
            if inside:
                keys[count] = mix(state)
                count += 1
            keys[count] = mix(np.uint64(fold))
            count += 1
            inside = digits = False
        elif fold != DROPPED:
            if not inside:
                inside, state = True, np.uint64(0x51_7C_C1_B7_27_22_0A_95)
            if not (fold == 48 and digits):
                state = (state ^ np.uint64(fold)) * np.uint64(0x9FB21C651E98DF25)
                state ^= state >> np.uint64(28)
            digits = fold == 48
        i += size
    if inside:
        keys[count] = mix(state)
        count += 1
    return count


@jit
def _shingle(keys, w, n):  # type: ignore[no-untyped-def]
    value = np.uint64(0)
    for k in range(n):
        value = (value ^ keys[w + k]) * np.uint64(0x9FB21C651E98DF25)
        value ^= value >> np.uint64(32)
    return mix(value)


@jit
def band_keys(data, offsets, folds, n, a, b, c, bands, rows):  # type: ignore[no-untyped-def]
    """uint64 [bands, texts]: one key per band of `rows` MinHash values; 0 for texts of fewer than n words."""
    texts = len(offsets) - 1
    out = np.zeros((bands, texts), dtype=np.uint64)
    longest = longest_text(offsets)
    keys = np.empty(longest + 1, dtype=np.uint64)
    hashes = bands * rows
    low = np.empty(hashes, dtype=np.uint32)
    for t in range(texts):
        words = _loose_words(data, offsets[t], offsets[t + 1], folds, keys)
        if words < n:
            continue
        low[:] = np.uint32(0xFFFFFFFF)
        for w in range(words - n + 1):
            shingle = _shingle(keys, w, n)
            x, y = np.uint32(shingle), np.uint32(shingle >> np.uint64(32))
            for h in range(hashes):
                value = np.uint32(a[h] * x + c[h] * y + b[h])
                low[h] = min(low[h], value)
        for band in range(bands):
            key = np.uint64(band + 1)
            for r in range(rows):
                key = mix(key ^ np.uint64(low[band * rows + r]))
            out[band, t] = max(key, np.uint64(1))
    return out


@jit
def shingle_hashes(data, offsets, folds, n):  # type: ignore[no-untyped-def]
    """All n-word shingles of all texts: uint64 hashes and where each text's begin (int64 [texts + 1])."""
    texts = len(offsets) - 1
    firsts = np.zeros(texts + 1, dtype=np.int64)
    out = np.empty(offsets[texts] - offsets[0] + 1, dtype=np.uint64)
    longest = longest_text(offsets)
    keys = np.empty(longest + 1, dtype=np.uint64)
    count = 0
    for t in range(texts):
        words = _loose_words(data, offsets[t], offsets[t + 1], folds, keys)
        for w in range(words - n + 1):
            out[count] = _shingle(keys, w, n)
            count += 1
        firsts[t + 1] = count
    return out[:count], firsts


@jit
def word_counts(data, offsets, folds):  # type: ignore[no-untyped-def]
    """int64 [texts]: loosely compared words in each text."""
    texts = len(offsets) - 1
    out = np.zeros(texts, dtype=np.int64)
    longest = longest_text(offsets)
    keys = np.empty(longest + 1, dtype=np.uint64)
    for t in range(texts):
        out[t] = _loose_words(data, offsets[t], offsets[t + 1], folds, keys)
    return out


_STEP = np.uint64(0x9FB21C651E98DF25)
_FILTER_BITS = 24  # a 2 MB bitmap in front of the table: nearly all lookups end there, in the cache


@jit
def _sums(keys, words, sums):  # type: ignore[no-untyped-def]
    """Running polynomial hashes, from which the hash of any n-gram is one multiplication."""
    sums[0] = np.uint64(0)
    for w in range(words):
        sums[w + 1] = sums[w] * _STEP + keys[w]


@jit
def _ngram(sums, w, n, power):  # type: ignore[no-untyped-def]
    return max(mix((sums[w + n] - sums[w] * power) ^ np.uint64(n)), np.uint64(1))


@jit
def _power(n):  # type: ignore[no-untyped-def]
    power = np.uint64(1)
    for _ in range(n):
        power *= _STEP
    return power


@jit
def overlaps(data, offsets, folds, lengths, table, owners, present):  # type: ignore[no-untyped-def]
    """Where texts share word n-grams with a table (`build_table`): per text the n-grams shared, and the owner of the first."""
    texts = len(offsets) - 1
    shared, owner = np.zeros(texts, dtype=np.int64), np.full(texts, -1, dtype=np.int64)
    longest = longest_text(offsets)
    keys, sums = np.empty(longest + 1, dtype=np.uint64), np.empty(longest + 2, dtype=np.uint64)
    for t in range(texts):
        words = _loose_words(data, offsets[t], offsets[t + 1], folds, keys)
        _sums(keys, words, sums)
        for n in lengths:
            power = _power(n)
            for w in range(words - n + 1):
                key = _ngram(sums, w, n, power)
                bit = key >> np.uint64(64 - _FILTER_BITS)
                if not present[bit >> np.uint64(6)] >> (bit & np.uint64(63)) & np.uint64(1):
                    continue
                place = slot(table, key)
                if table[place] == key:
                    shared[t] += 1
                    if owner[t] < 0:
                        owner[t] = owners[place]
    return shared, owner


@jit
def build_table(data, offsets, folds, n, shortest, size):  # type: ignore[no-untyped-def]
    """The table that `overlaps` looks in: the n-grams of all texts; a text of `shortest` to n - 1 words is one n-gram itself.

    Returns the table (open addressing, 0 is free), the text that owns each entry, which lengths occur, and the bitmap in front of it.
    """
    table, owners = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.int64)
    lengths, present = np.zeros(n + 1, dtype=np.int64), np.zeros(1 << (_FILTER_BITS - 6), dtype=np.uint64)
    longest = longest_text(offsets)
    keys, sums = np.empty(longest + 1, dtype=np.uint64), np.empty(longest + 2, dtype=np.uint64)
    for t in range(len(offsets) - 1):
        words = _loose_words(data, offsets[t], offsets[t + 1], folds, keys)
        if words < shortest:
            continue
        _sums(keys, words, sums)
        width = min(words, n)
        power = _power(width)
        lengths[width] = 1
        for w in range(words - width + 1):
            key = _ngram(sums, w, width, power)
            place = slot(table, key)
            if table[place] == 0:
                table[place] = key
                owners[place] = t
                bit = key >> np.uint64(64 - _FILTER_BITS)
                present[bit >> np.uint64(6)] |= np.uint64(1) << (bit & np.uint64(63))
    return table, owners, lengths, present


@jit
def union(edges, count):  # type: ignore[no-untyped-def]
    """Connected components: int64 [count], the smallest member of each node's component; `edges` is int64 [m, 2]."""
    parent = np.arange(count)
    for e in range(len(edges)):
        a, b = edges[e, 0], edges[e, 1]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        elif b < a:
            parent[a] = b
    for i in range(count):
        parent[i] = parent[parent[i]]
    return parent


def hash_functions(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The multipliers a, the addends b and the multipliers c of `count` MinHash functions (uint32 each), drawn from `seed`."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    a, b, c = (generator.integers(0, 1 << 32, count, dtype=np.uint32) for _ in range(3))
    return a | np.uint32(1), b, c | np.uint32(1)
