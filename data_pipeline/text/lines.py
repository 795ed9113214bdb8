"""Lines: their borders, repeats and rewriting."""

import numpy as np

from regrowth.data_pipeline.text.characters import SPACE, decode, hash_bytes
from regrowth.data_pipeline.text.jit import jit


@jit
def break_length(data, i, stop):  # type: ignore[no-untyped-def]
    """Bytes of the line break at byte `i` (those of `str.splitlines`), 0 where there is none."""
    byte = data[i]
    if byte == 10 or byte == 11 or byte == 12 or 28 <= byte <= 30:
        return 1
    if byte == 13:
        return 2 if i + 1 < stop and data[i + 1] == 10 else 1
    if byte == 0xC2 and i + 1 < stop and data[i + 1] == 0x85:
        return 2
    if byte == 0xE2 and i + 2 < stop and data[i + 1] == 0x80 and (data[i + 2] == 0xA8 or data[i + 2] == 0xA9):
        return 3
    return 0


@jit
def trim(data, start, stop, classes):  # type: ignore[no-untyped-def]
    """The range without white space at its ends."""
    while start < stop:
        point, size = decode(data, start)
        if not classes[point] & SPACE:
            break
        start += size
    while stop > start:
        i = stop - 1
        while np.int64(data[i]) & 0xC0 == 0x80:
            i -= 1
        point, _ = decode(data, i)
        if not classes[point] & SPACE:
            break
        stop = i
    return start, stop


@jit
def unit_hashes(data, offsets, classes, paragraphs, minimum):  # type: ignore[no-untyped-def]
    """A hash for each line (or paragraph) of each text, 0 for those under `minimum` bytes after trimming; and each text's first unit."""
    documents = len(offsets) - 1
    firsts = np.zeros(documents + 1, dtype=np.int64)
    total = 0
    for d in range(documents):
        i, stop = offsets[d], offsets[d + 1]
        while i <= stop:
            _, i = unit_end(data, i, stop, paragraphs)
            total += 1
        firsts[d + 1] = total
    hashes = np.zeros(total, dtype=np.uint64)
    unit = 0
    for d in range(documents):
        i, stop = offsets[d], offsets[d + 1]
        while i <= stop:
            end, following = unit_end(data, i, stop, paragraphs)
            a, b = trim(data, i, end, classes)
            if b - a >= minimum:
                hashes[unit] = max(hash_bytes(data, a, b), np.uint64(1))
            unit += 1
            i = following
    return hashes, firsts


@jit
def unit_end(data, start, stop, paragraphs):  # type: ignore[no-untyped-def]
    """Where the unit that starts at `start` ends, and where the next begins (beyond `stop` after the last)."""
    i = start
    while i < stop:
        if data[i] == 10:
            run = i
            while run < stop and data[run] == 10:
                run += 1
            if not paragraphs:
                return i, i + 1
            if run - i > 1:
                return i, run
            i = run
        else:
            i += 1
    return stop, stop + 1


@jit
def keep_units(data, offsets, firsts, keep, paragraphs):  # type: ignore[no-untyped-def]
    """The texts without the units that `keep` says no to: bytes, offsets, and bytes removed per text."""
    documents = len(offsets) - 1
    out = np.empty(len(data), dtype=np.uint8)
    new = np.zeros(documents + 1, dtype=np.int64)
    removed = np.zeros(documents, dtype=np.int64)
    place = 0
    for d in range(documents):
        i, stop = offsets[d], offsets[d + 1]
        unit = firsts[d]
        while i <= stop:
            end, following = unit_end(data, i, stop, paragraphs)
            if keep[unit]:
                last = min(following, stop)
                out[place : place + last - i] = data[i:last]
                place += last - i
            else:
                removed[d] += end - i
            unit += 1
            i = following
        new[d + 1] = place
    return out[:place], new, removed


@jit
def bloom_insert(bits, hashes, probes, seen):  # type: ignore[no-untyped-def]
    """Put hashes (0 is passed over) into a Bloom filter in order; `seen` is set where the filter had one already. Returns how many were new."""
    size = np.uint64(len(bits)) * np.uint64(64)
    new = 0
    for i in range(len(hashes)):
        key = hashes[i]
        if key == 0:
            continue
        step = (key >> np.uint64(33)) | np.uint64(1)
        place = key
        known = True
        for _ in range(probes):
            bit = place % size
            mask = np.uint64(1) << (bit & np.uint64(63))
            word = bit >> np.uint64(6)
            if not bits[word] & mask:
                known = False
                bits[word] |= mask
            place += step * np.uint64(0x9E3779B97F4A7C15)
        seen[i] = known
        new += not known
    return new
