"""The counts that the published quality rules are made of, for a whole batch of texts in one pass each."""

import numpy as np

from regrowth.data_pipeline.text.characters import ALPHA, SPACE, TERMINAL, before, count_characters, decode, hash_bytes, longest_text, mix
from regrowth.data_pipeline.text.hashtable import add_to_set, slot, table_size
from regrowth.data_pipeline.text.jit import jit
from regrowth.data_pipeline.text.lines import break_length, trim
from regrowth.data_pipeline.text.words import has_letter, is_symbol_word, split_words

# Columns of `prose_counts`.
(WORDS, NON_SYMBOL, NON_SYMBOL_CHARACTERS, HASHES, ELLIPSES, LINES, BULLETS, ELLIPSIS_LINES, LETTER_WORDS, STOP_WORDS) = range(10)


@jit
def prose_counts(data, offsets, classes, known, stop_words):  # type: ignore[no-untyped-def]
    """int64 [texts, 10]: the counts named by the column constants. `stop_words` are hashes; at most 64, each counted once."""
    texts = len(offsets) - 1
    out = np.zeros((texts, 10), dtype=np.int64)
    longest = longest_text(offsets)
    starts, stops = np.empty(longest + 1, dtype=np.int64), np.empty(longest + 1, dtype=np.int64)
    for t in range(texts):
        start, stop = offsets[t], offsets[t + 1]
        row = out[t]
        words = split_words(data, start, stop, classes, known, starts, stops)
        row[WORDS] = words
        met = np.uint64(0)
        for w in range(words):
            a, b = starts[w], stops[w]
            if not is_symbol_word(data, a, b, classes):
                row[NON_SYMBOL] += 1
                row[NON_SYMBOL_CHARACTERS] += count_characters(data, a, b)
                row[LETTER_WORDS] += has_letter(data, a, b, classes)
                if b - a <= 16:
                    key = hash_bytes(data, a, b)
                    for s in range(len(stop_words)):
                        if stop_words[s] == key:
                            met |= np.uint64(1) << np.uint64(s)
        while met:
            row[STOP_WORDS] += 1
            met &= met - np.uint64(1)
        i = start
        while i < stop:
            if data[i] == 35:
                row[HASHES] += 1
            elif (data[i] == 46 and i + 2 < stop and data[i + 1] == 46 and data[i + 2] == 46) or (
                data[i] == 0xE2 and i + 2 < stop and data[i + 1] == 0x80 and data[i + 2] == 0xA6
            ):
                row[ELLIPSES] += 1
                i += 2
            i += 1
        i = start
        while i < stop:
            begin = i
            size = 0
            while i < stop:
                size = break_length(data, i, stop)
                if size:
                    break
                i += 1
            a, b = trim(data, begin, i, classes)
            row[LINES] += 1
            if b > a:
                row[BULLETS] += data[a] == 45 or (b - a >= 3 and data[a] == 0xE2 and data[a + 1] == 0x80 and data[a + 2] == 0xA2)
                if b - a >= 3:
                    dots = data[b - 1] == 46 and data[b - 2] == 46 and data[b - 3] == 46
                    row[ELLIPSIS_LINES] += dots or (data[b - 1] == 0xA6 and data[b - 2] == 0x80 and data[b - 3] == 0xE2)
            i += max(size, 1)
    return out


# Columns of `line_counts`.
(SPOKEN_LINES, TERMINAL_LINES, SHORT_LINES, REPEATED_LINE_CHARACTERS, NEWLINES, TEXT_CHARACTERS, TEXT_WORDS) = range(7)


@jit
def line_counts(data, offsets, classes, known, short):  # type: ignore[no-untyped-def]
    """int64 [texts, 7]: the counts named by the column constants; lines of at most `short` characters are short."""
    texts = len(offsets) - 1
    out = np.zeros((texts, 7), dtype=np.int64)
    longest = longest_text(offsets)
    starts, stops = np.empty(longest + 1, dtype=np.int64), np.empty(longest + 1, dtype=np.int64)
    for t in range(texts):
        start, stop = offsets[t], offsets[t + 1]
        row = out[t]
        for i in range(start, stop):
            row[NEWLINES] += data[i] == 10
        row[TEXT_CHARACTERS] = count_characters(data, start, stop)
        row[TEXT_WORDS] = split_words(data, start, stop, classes, known, starts, stops)
        seen = np.zeros(table_size(row[NEWLINES] + 1), dtype=np.uint64)
        i = start
        while i <= stop:
            begin = i
            while i < stop and data[i] != 10:
                i += 1
            a, b = trim(data, begin, i, classes)
            if b > a:
                row[SPOKEN_LINES] += 1
                last, _ = before(data, i)
                row[TERMINAL_LINES] += classes[last] & TERMINAL != 0
                characters = count_characters(data, begin, i)
                row[SHORT_LINES] += characters <= short
                if add_to_set(seen, max(hash_bytes(data, begin, i), np.uint64(1))):
                    row[REPEATED_LINE_CHARACTERS] += characters
            i += 1
    return out


@jit
def repetition_counts(data, offsets, classes, known, top, duplicated):  # type: ignore[no-untyped-def]
    """What repeats in each text, in characters unless said otherwise.

    int64 [texts, 7 + len(top) + len(duplicated)]: characters of the text; paragraphs, repeated paragraphs, characters in those; lines,
    repeated lines, characters in those; then per n of `top` the characters that the commonest n-gram covers; then per n of `duplicated`
    the characters in n-grams met before (an n-gram that is one is passed over whole).
    """
    texts = len(offsets) - 1
    out = np.zeros((texts, 7 + len(top) + len(duplicated)), dtype=np.int64)
    longest = longest_text(offsets)
    starts, stops = np.empty(longest + 1, dtype=np.int64), np.empty(longest + 1, dtype=np.int64)
    keys, lengths = np.empty(longest + 1, dtype=np.uint64), np.empty(longest + 2, dtype=np.int64)
    for t in range(texts):
        start, stop = offsets[t], offsets[t + 1]
        row = out[t]
        row[0] = count_characters(data, start, stop)
        _repeated_lines(data, start, stop, classes, row)
        words = split_words(data, start, stop, classes, known, starts, stops)
        lengths[0] = 0
        for w in range(words):
            keys[w] = hash_bytes(data, starts[w], stops[w])
            lengths[w + 1] = lengths[w] + count_characters(data, starts[w], stops[w])
        size = table_size(words + 1)
        for k in range(len(top)):
            row[7 + k] = _commonest(keys, lengths, words, top[k], size)
        for k in range(len(duplicated)):
            row[7 + len(top) + k] = _met_before(keys, lengths, words, duplicated[k], size)
    return out


@jit
def _repeated_lines(data, start, stop, classes, row):  # type: ignore[no-untyped-def]
    a, b = trim(data, start, stop, classes)
    breaks = 0
    for i in range(start, stop):
        breaks += data[i] == 10
    # Paragraphs part at two or more newlines, of the trimmed text; lines at one or more, of the whole text.
    for kind in range(2):
        seen = np.zeros(table_size(breaks + 1), dtype=np.uint64)
        i, end = (a, b) if kind == 0 else (start, stop)
        column = 1 + 3 * kind
        needed = 2 - kind
        begin = i
        while True:
            run = 0
            while i + run < end and data[i + run] == 10:
                run += 1
            if i >= end or run >= needed:
                row[column] += 1
                if add_to_set(seen, max(hash_bytes(data, begin, i), np.uint64(1))):
                    row[column + 1] += 1
                    row[column + 2] += count_characters(data, begin, i)
                if i >= end:
                    break
                i += run
                begin = i
            else:
                i += max(run, 1)


@jit
def _gram(keys, w, n):  # type: ignore[no-untyped-def]
    key = np.uint64(n)
    for k in range(n):
        key = mix(key ^ keys[w + k])
    return max(key, np.uint64(1))


@jit
def _commonest(keys, lengths, words, n, size):  # type: ignore[no-untyped-def]
    """Characters (spaces between the words counted) times occurrences of the commonest n-gram; among equals the first met counts."""
    if words < n:
        return 0
    table, counts, firsts = np.zeros(size, dtype=np.uint64), np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    best, best_first = 0, 0
    for w in range(words - n + 1):
        key = _gram(keys, w, n)
        place = slot(table, key)
        if table[place] == 0:
            table[place] = key
            firsts[place] = w
        counts[place] += 1
    for place in range(size):
        if counts[place] > best or (counts[place] == best and best > 0 and firsts[place] < best_first):
            best, best_first = counts[place], firsts[place]
    return best * (lengths[best_first + n] - lengths[best_first] + n - 1)


@jit
def _met_before(keys, lengths, words, n, size):  # type: ignore[no-untyped-def]
    seen = np.zeros(size, dtype=np.uint64)
    repeated = 0
    w = 0
    while w < words - n + 1:
        if add_to_set(seen, _gram(keys, w, n)):
            repeated += lengths[w + n] - lengths[w]
            w += n
        else:
            w += 1
    return repeated


# What happened to a document in `c4_lines`.
KEPT, LOREM_IPSUM, CURLY_BRACKET, TOO_FEW_SENTENCES = range(4)


@jit
def c4_lines(data, offsets, classes, known, phrases, phrase_starts, citations, citation_starts, min_words, max_word, min_sentences, flags):  # type: ignore[no-untyped-def]
    """C4's line rules and document rules.

    `phrases` are concatenated lower-case ASCII strings (the first "lorem ipsum", then those that cost a line); `citations` are those that
    may follow "[" in a citation. `flags`: terminal punctuation, lorem ipsum, curly bracket, citations. Returns the new bytes and offsets,
    what happened to each document, and per document the lines dropped as [too long a word, no terminal mark, too few words, phrase].
    """
    texts = len(offsets) - 1
    out, new = np.empty(len(data) + texts, dtype=np.uint8), np.zeros(texts + 1, dtype=np.int64)
    fate, dropped = np.zeros(texts, dtype=np.int64), np.zeros((texts, 4), dtype=np.int64)
    longest = longest_text(offsets)
    line = np.empty(longest + 1, dtype=np.uint8)
    starts, stops = np.empty(longest + 1, dtype=np.int64), np.empty(longest + 1, dtype=np.int64)
    place = 0
    for t in range(texts):
        i, stop = offsets[t], offsets[t + 1]
        first, sentences = place, 0
        while i < stop and fate[t] == KEPT:
            begin, size = i, 0
            while i < stop:
                size = break_length(data, i, stop)
                if size:
                    break
                i += 1
            a, b = trim(data, begin, i, classes)
            i += max(size, 1)
            words, too_long = _spaced_words(data, a, b, classes, max_word)
            if too_long:
                dropped[t, 0] += 1
                continue
            length = _without_citations(data, a, b, line, citations, citation_starts) if flags[3] else _copy(data, a, b, line)
            if flags[0] and not _ends_well(line, length):
                dropped[t, 1] += 1
                continue
            if words < min_words:
                dropped[t, 2] += 1
                continue
            found = _phrase_in(line, length, phrases, phrase_starts)
            if found == 0 and flags[1]:
                fate[t] = LOREM_IPSUM
                break
            if flags[2] and (found == -2 or _has_curly(line, length)):
                if found > 0 and found == 1:  # the javascript rule comes before the bracket
                    dropped[t, 3] += 1
                    continue
                fate[t] = CURLY_BRACKET
                break
            if found > 0:
                dropped[t, 3] += 1
                continue
            sentences += _sentences(line, length, classes, known, starts, stops)
            out[place : place + length] = line[:length]
            place += length
            out[place] = 10
            place += 1
        if fate[t] == KEPT and sentences < min_sentences:
            fate[t] = TOO_FEW_SENTENCES
        if fate[t] != KEPT:
            place = first
        else:
            a, b = trim(out, first, place, classes)
            if a > first:
                for k in range(b - a):
                    out[first + k] = out[a + k]
            place = first + b - a
        new[t + 1] = place
    return out[:place], new, fate, dropped


@jit
def _spaced_words(data, a, b, classes, max_word):  # type: ignore[no-untyped-def]
    words, length, too_long = 0, 0, False
    i = a
    while i < b:
        point, size = decode(data, i)
        if classes[point] & SPACE:
            length = 0
        else:
            words += length == 0
            length += 1
            too_long = too_long or (max_word >= 0 and length > max_word)
        i += size
    return words, too_long


@jit
def _copy(data, a, b, line):  # type: ignore[no-untyped-def]
    for k in range(b - a):
        line[k] = data[a + k]
    return b - a


@jit
def _without_citations(data, a, b, line, citations, citation_starts):  # type: ignore[no-untyped-def]
    """Copy [a, b) without "[12]", "[]" and the phrases in brackets that `citations` holds; returns the length."""
    length = 0
    i = a
    while i < b:
        if data[i] == 91:
            j = i + 1
            while j < b and 48 <= data[j] <= 57:
                j += 1
            skip = j + 1 - i if j < b and data[j] == 93 else 0
            for c in range(len(citation_starts) - 1):
                size = citation_starts[c + 1] - citation_starts[c]
                if skip == 0 and i + 1 + size <= b:
                    same = True
                    for k in range(size):
                        same = same and data[i + 1 + k] == citations[citation_starts[c] + k]
                    if same:
                        skip = 1 + size
            if skip:
                i += skip
                continue
        line[length] = data[i]
        length += 1
        i += 1
    return length


@jit
def _ends_well(line, length):  # type: ignore[no-untyped-def]
    if length == 0:
        return False
    last = line[length - 1]
    ends = last == 46 or last == 63 or last == 33 or last == 34 or last == 39
    return ends and not (length >= 3 and last == 46 and line[length - 2] == 46 and line[length - 3] == 46)


@jit
def _phrase_in(line, length, phrases, phrase_starts):  # type: ignore[no-untyped-def]
    """The first of the phrases, in their order, that the line holds without regard to case; -1 for none."""
    for p in range(len(phrase_starts) - 1):
        begin, size = phrase_starts[p], phrase_starts[p + 1] - phrase_starts[p]
        for i in range(length - size + 1):
            k = 0
            while k < size:
                byte = line[i + k]
                byte = byte + 32 if 65 <= byte <= 90 else byte
                if byte != phrases[begin + k]:
                    break
                k += 1
            if k == size:
                return p
    return -1


@jit
def _has_curly(line, length):  # type: ignore[no-untyped-def]
    for i in range(length):
        if line[i] == 123:
            return True
    return False


@jit
def _sentences(line, length, classes, known, starts, stops):  # type: ignore[no-untyped-def]
    """Sentences of a line: one, and one more wherever a word follows a sentence-ending mark."""
    words = split_words(line, 0, length, classes, known, starts, stops)
    if words == 0:
        return 0
    count, ended = 1, False
    for w in range(words):
        a, b = starts[w], stops[w]
        point, size = decode(line, a)
        if size == b - a and classes[point] & TERMINAL:
            ended = True
        elif ended and not is_symbol_word(line, a, b, classes):
            count += 1
            ended = False
    return count


@jit
def letters_fraction(data, offsets, classes):  # type: ignore[no-untyped-def]
    """float64 [texts]: alphabetic characters of all characters that are not white space."""
    out = np.zeros(len(offsets) - 1)
    for t in range(len(offsets) - 1):
        letters, visible = 0, 0
        i = offsets[t]
        while i < offsets[t + 1]:
            point, size = decode(data, i)
            letters += classes[point] & ALPHA != 0
            visible += classes[point] & SPACE == 0
            i += size
        out[t] = letters / max(visible, 1)
    return out
