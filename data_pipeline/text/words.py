"""Words as linguists' tokenizers cut them: at white space, then punctuation off the edges, then inside at hyphens, dots and clitics.

The rules follow the conventions of English tokenization that the published filters were calibrated on (counts of "words" in Gopher's rules
include punctuation tokens); other languages get the same rules, as in those filters.
"""

from functools import cache

import numpy as np

from regrowth.data_pipeline.text.characters import (
    ALPHA,
    DIGIT,
    EDGE,
    LOWER,
    SPACE,
    SYMBOL,
    UPPER,
    before,
    decode,
    hash_bytes,
)
from regrowth.data_pipeline.text.jit import jit

# Abbreviations keep their dot (lower case; compared without case).
_ABBREVIATIONS = [
    "mr.",
    "mrs.",
    "ms.",
    "dr.",
    "st.",
    "jr.",
    "sr.",
    "co.",
    "inc.",
    "ltd.",
    "corp.",
    "vs.",
    "e.g.",
    "i.e.",
    "p.m.",
    "a.m.",
    "gen.",
    "rep.",
    "sen.",
    "gov.",
    "prof.",
    "rev.",
    "mt.",
    "ft.",
    "vol.",
    "jan.",
    "feb.",
    "mar.",
    "apr.",
    "jun.",
    "jul.",
    "aug.",
    "sep.",
    "sept.",
    "oct.",
    "nov.",
    "dec.",
    "u.s.",
    "u.k.",
    "u.n.",
    "d.c.",
    "ph.d.",
    "al.",
    "fig.",
    "ala.",
    "ariz.",
    "ark.",
    "calif.",
    "colo.",
    "conn.",
    "del.",
    "fla.",
    "ga.",
    "ill.",
    "ind.",
    "kan.",
    "kans.",
    "ky.",
    "la.",
    "mass.",
    "mich.",
    "minn.",
    "miss.",
    "mo.",
    "mont.",
    "neb.",
    "nebr.",
    "nev.",
    "okla.",
    "ore.",
    "pa.",
    "tenn.",
    "va.",
    "wash.",
    "wis.",
    "adm.",
    "bros.",
    "n.c.",
    "n.d.",
    "n.h.",
    "n.j.",
    "n.m.",
    "n.y.",
    "s.c.",
    "s.d.",
    "o.k.",
    "messrs.",
]


# Words whose 'd is a word of its own ("would", "had").
_BEFORE_D = ["i", "you", "he", "she", "it", "we", "they", "who", "what", "when", "where", "why", "how", "there", "that", "this"]


# Units that are split off a number.
_UNITS = [
    "km",
    "m",
    "dm",
    "cm",
    "mm",
    "ha",
    "nm",
    "yd",
    "in",
    "ft",
    "kg",
    "g",
    "mg",
    "t",
    "lb",
    "oz",
    "kmh",
    "mph",
    "hPa",
    "Pa",
    "mb",
    "MB",
    "kb",
    "KB",
    "gb",
    "GB",
    "tb",
    "TB",
    "T",
    "G",
    "M",
    "K",
]


@cache
def abbreviations() -> np.ndarray:
    """Sorted hashes of what the rules know by heart: abbreviations that keep their dot, pronouns with 'd, units (marked with #)."""
    return word_hashes([*_ABBREVIATIONS, *("#" + unit for unit in _UNITS), *(word + mark + "d" for word in _BEFORE_D for mark in "'’")])


def word_hashes(words: list[str]) -> np.ndarray:
    """Sorted 64-bit hashes of words, to look words of a text up in."""
    encoded = [np.frombuffer(w.encode(), dtype=np.uint8) for w in words]
    return np.sort(np.array([hash_bytes(e, 0, len(e)) for e in encoded], dtype=np.uint64))


@jit
def contains(sorted_hashes, value):  # type: ignore[no-untyped-def]
    """Whether a sorted array holds a value."""
    low = np.searchsorted(sorted_hashes, value)
    return low < len(sorted_hashes) and sorted_hashes[low] == value


@jit
def _hash_lower(data, start, stop):  # type: ignore[no-untyped-def]
    lowered = np.empty(stop - start, dtype=np.uint8)
    for k in range(stop - start):
        byte = data[start + k]
        lowered[k] = byte + 32 if 65 <= byte <= 90 else byte
    return hash_bytes(lowered, 0, stop - start)


@jit
def _hash_unit(data, start, stop):  # type: ignore[no-untyped-def]
    marked = np.empty(stop - start + 1, dtype=np.uint8)
    marked[0] = 35
    for k in range(stop - start):
        marked[k + 1] = data[start + k]
    return hash_bytes(marked, 0, stop - start + 1)


@jit
def _is_quote(point):  # type: ignore[no-untyped-def]
    return point == 39 or point == 34 or point == 96 or 0x2018 <= point <= 0x201F or point == 0xAB or point == 0xBB


@jit
def _prefix_length(data, a, b, classes):  # type: ignore[no-untyped-def]
    """Bytes of the token that splits off at the front of [a, b), 0 for none."""
    point, size = decode(data, a)
    if point == 46:  # dots: two or more are one token
        stop = a
        while stop < b and data[stop] == 46:
            stop += 1
        return stop - a if stop - a > 1 else 0
    if point == 43:  # +, unless a number follows
        return 0 if a + 1 < b and 48 <= data[a + 1] <= 57 else 1
    if classes[point] & EDGE:
        return size
    return 0


@jit
def _suffix_length(data, a, b, classes, known, keeps_dot):  # type: ignore[no-untyped-def]
    """Bytes of the token that splits off at the end of [a, b), 0 for none."""
    point, size = before(data, b)
    if b - size < a:
        return 0
    if point == 46:
        start = b
        while start > a and data[start - 1] == 46:
            start -= 1
        if b - start > 1:
            return b - start
        if start == a:
            return 0
        last, length = before(data, start)
        cls = classes[last]
        if cls & DIGIT or (cls & LOWER and not keeps_dot) or (cls & EDGE and last != 36) or last == 43 or last == 45 or last == 0xB2:
            return 1
        if cls & UPPER and start - length > a:
            second, _ = before(data, start - length)
            if classes[second] & UPPER:
                return 1
        return 0
    if point == 43:
        return 1 if b - 1 > a and 48 <= data[b - 2] <= 57 else 0
    if point == 36 or point == 0xA3 or point == 0x20AC or point == 0xA5:  # currencies: after a number
        return size if b - size > a and classes[before(data, b - size)[0]] & DIGIT else 0
    if point == 61 or point == 0xA7:
        return 0
    if classes[point] & EDGE:
        return size
    if 65 <= point <= 122:
        letters = 1
        while letters < 4 and b - letters > a and 65 <= data[b - letters - 1] <= 122:
            letters += 1
        if letters < 4 and b - letters > a and 48 <= data[b - letters - 1] <= 57 and contains(known, _hash_unit(data, b - letters, b)):
            return letters
    if (point == 115 or point == 83) and b - 1 > a:  # 's
        mark, length = before(data, b - 1)
        if (mark == 39 or mark == 0x2019) and b - 1 - length >= a:
            return 1 + length
    return 0


@jit
def _clitic(data, a, b, known):  # type: ignore[no-untyped-def]
    """Where a clitic ('ll 're 've 'm 'd n't) starts in the word [a, b), or b."""
    if b - a < 3:
        return b
    last = data[b - 1] | 32
    # n't and n’t
    if last == 116:
        if data[b - 2] == 39 and b - 3 > a and data[b - 3] | 32 == 110:
            return b - 3
        if b - 5 > a and data[b - 2] == 0x99 and data[b - 3] == 0x80 and data[b - 4] == 0xE2 and data[b - 5] | 32 == 110:
            return b - 5
        return b
    width = 0
    if last == 109 or (
        last == 100 and b - a <= 9 and contains(known, _hash_lower(data, a, b))
    ):  # 'd after a pronoun; else it is an elided -ed
        width = 1
    elif (last == 108 and data[b - 2] | 32 == 108) or (last == 101 and (data[b - 2] | 32 == 114 or data[b - 2] | 32 == 118)):
        width = 2
    if width == 0:
        return b
    if b - width - 1 > a and data[b - width - 1] == 39:
        return b - width - 1
    if b - width - 3 > a and data[b - width - 1] == 0x99 and data[b - width - 2] == 0x80 and data[b - width - 3] == 0xE2:
        return b - width - 3
    return b


@jit
def _is_address(data, a, b):  # type: ignore[no-untyped-def]
    """Whether [a, b) is a web or mail address or a file's name, which stay whole."""
    i = a
    while i < b and 97 <= data[i] | 32 <= 122:
        i += 1
    if a < i < b - 3 and data[i] == 58 and data[i + 1] == 47 and data[i + 2] == 47:
        return True
    host = a
    for i in range(a + 1, b):
        if data[i] == 64:
            host = i + 1
    # host.name or file.ext: letters, digits, hyphens and dots; the last label is of at least two small letters; a path may follow.
    label, small, dots = 0, True, 0
    for i in range(host, b):
        byte = data[i]
        if byte == 46:
            if label == 0:
                return False
            dots += 1
            label, small = 0, True
        elif 97 <= byte <= 122 or 65 <= byte <= 90 or 48 <= byte <= 57 or byte == 45:
            label += 1
            small = small and 97 <= byte <= 122
        elif (byte == 47 or byte == 63 or byte == 58) and dots > 0 and small and label >= 2:
            return True
        else:
            return False
    return dots > 0 and small and label >= 2


@jit
def _emit(data, a, b, classes, known, starts, stops, count):  # type: ignore[no-untyped-def]
    """The core of a word, cut inside: ellipses, hyphens and slashes between letters, and a clitic at its end."""
    if (
        b - a == 6
        and data[a] == 97
        and data[a + 1] == 110
        and data[a + 2] == 100
        and data[a + 3] == 47
        and data[a + 4] == 111
        and data[a + 5] == 114
    ):
        starts[count], stops[count] = a, b  # and/or
        return count + 1
    clitic = _clitic(data, a, b, known)
    begin = a
    i = a
    previous = np.int64(0)
    while i < clitic:
        point, size = decode(data, i)
        cut = 0
        if i > a and i + size < clitic:
            following, _ = decode(data, i + size)
            left, right = classes[previous], classes[following]
            if point == 46 and following == 46:
                stop = i
                while stop < clitic and data[stop] == 46:
                    stop += 1
                cut = stop - i
            elif point == 0x2026:
                cut = size
            elif point == 45 or point == 0x2013 or point == 0x2014 or point == 126:
                if left & (ALPHA | DIGIT):
                    if point == 45 and following == 45:  # -- and ---
                        stop = i
                        while stop < clitic and data[stop] == 45 and stop - i < 3:
                            stop += 1
                        if stop < clitic and classes[decode(data, stop)[0]] & ALPHA:
                            cut = stop - i
                    elif right & ALPHA or (point == 45 and left & DIGIT and right & DIGIT):
                        cut = size
            elif point == 43 or point == 42 or point == 94:
                if left & DIGIT and right & DIGIT:
                    cut = size
            elif point == 46:
                if (left & LOWER or _is_quote(previous)) and (right & UPPER or _is_quote(following)):
                    cut = size
            elif point == 44:
                if left & ALPHA and right & ALPHA:
                    cut = size
            elif (point == 58 or point == 60 or point == 61 or point == 62 or point == 47) and left & (ALPHA | DIGIT) and right & ALPHA:
                cut = size
        if cut:
            if i > begin:
                starts[count], stops[count] = begin, i
                count += 1
            starts[count], stops[count] = i, i + cut
            count += 1
            i += cut
            begin = i
            previous = np.int64(46)
            continue
        previous = point
        i += size
    if clitic > begin:
        starts[count], stops[count] = begin, clitic
        count += 1
    if b > clitic:
        starts[count], stops[count] = clitic, b
        count += 1
    return count


@jit
def _join_faces(data, first, count, starts, stops):  # type: ignore[no-untyped-def]
    """Join neighbouring marks that make a face, as tokenizers with emoticon rules do: ): :) (: :( ;) :] :* 8)."""
    kept = first
    w = first
    while w < count:
        starts[kept], stops[kept] = starts[w], stops[w]
        if w + 1 < count and stops[w] == starts[w + 1] and stops[w] - starts[w] == 1 and stops[w + 1] - starts[w + 1] == 1:
            x, y = data[starts[w]], data[starts[w + 1]]
            if (
                (x == 41 and y == 58)
                or ((x == 58 or x == 59) and (y == 41 or y == 40 or y == 93 or (y == 42 and x == 58)))
                or (x == 40 and y == 58)
                or (x == 56 and y == 41)
            ):
                stops[kept] = stops[w + 1]
                w += 1
        kept += 1
        w += 1
    return kept


@jit
def split_words(data, start, stop, classes, known, starts, stops):  # type: ignore[no-untyped-def]
    """Write the byte ranges of the words of data[start:stop] into `starts` and `stops` (each at least stop - start long); returns how many."""
    count = 0
    i = start
    while i < stop:
        point, size = decode(data, i)
        if classes[point] & SPACE:
            i += size
            continue
        a = i
        plain, digit = True, False  # letters only, or digits behind letters: nothing to cut
        while i < stop:
            byte = data[i]
            if byte < 0x80:
                cls = classes[byte]
                if cls & SPACE:
                    break
                plain = plain and (cls & DIGIT != 0 or (cls & ALPHA != 0 and not digit))
                digit = digit or cls & DIGIT != 0
                i += 1
            else:
                point, size = decode(data, i)
                cls = classes[point]
                if cls & SPACE:
                    break
                plain = plain and cls & ALPHA != 0
                i += size
        b = i
        if plain:
            if (
                b - a == 6
                and (data[a] == 99 or data[a] == 67)
                and data[a + 1] == 97
                and data[a + 2] == 110
                and data[a + 3] == 110
                and data[a + 4] == 111
                and data[a + 5] == 116
            ):
                starts[count], stops[count] = a, a + 3
                count += 1
                a += 3
            starts[count], stops[count] = a, b
            count += 1
            continue
        first = count
        # Prefixes and suffixes, as long as any splits off; an abbreviation keeps its dot.
        while a < b:
            length = _prefix_length(data, a, b, classes)
            if length == 0:
                break
            starts[count], stops[count] = a, a + length
            count += 1
            a += length
        end = b
        while end > a:
            keeps_dot = data[end - 1] == 46 and end - a <= 8 and (end - a == 2 or contains(known, _hash_lower(data, a, end)))
            length = _suffix_length(data, a, end, classes, known, keeps_dot)
            if length == 0 or end - length < a:
                break
            end -= length
        if end > a:
            if _is_address(data, a, end):
                starts[count], stops[count] = a, end
                count += 1
            else:
                count = _emit(data, a, end, classes, known, starts, stops, count)
        # The suffixes, from left to right.
        while end < b:
            point, size = decode(data, end)
            if point == 46:
                size = 0
                while end + size < b and data[end + size] == 46:
                    size += 1
            elif (point == 39 or point == 0x2019) and end + size < b and data[end + size] | 32 == 115:
                size += 1
            elif 65 <= point <= 122 and classes[point] & ALPHA:
                while end + size < b and 65 <= data[end + size] <= 122 and classes[data[end + size]] & ALPHA:
                    size += 1
            starts[count], stops[count] = end, end + size
            count += 1
            end += size
        count = _join_faces(data, first, count, starts, stops)
    return count


@jit
def is_symbol_word(data, start, stop, classes):  # type: ignore[no-untyped-def]
    """Whether a word is punctuation and symbols only."""
    i = start
    while i < stop:
        point, size = decode(data, i)
        if not classes[point] & SYMBOL:
            return False
        i += size
    return True


@jit
def has_letter(data, start, stop, classes):  # type: ignore[no-untyped-def]
    """Whether a word has an alphabetic character."""
    i = start
    while i < stop:
        point, size = decode(data, i)
        if classes[point] & ALPHA:
            return True
        i += size
    return False
