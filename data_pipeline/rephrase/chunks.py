"""A document in pieces that a model can take, cut where paragraphs, sentences or at worst words end."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

CountTokens = Callable[[str], int]
_BYTES_A_TOKEN = 4  # of English in usual vocabularies; other scripts have fewer, so that their chunks are a little small at worst
_PARAGRAPHS = re.compile(r"\n[ \t]*\n\s*")
_SENTENCES = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])|\n+")
_WORDS = re.compile(r"\s+")


class Chunk(NamedTuple):
    """Characters `begin` to `end` of a document."""

    begin: int
    end: int


def estimated_tokens(text: str) -> int:
    """By its bytes."""
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_A_TOKEN)


def chunks(text: str, most: int, count: CountTokens = estimated_tokens) -> list[Chunk]:
    """Chunks of at most `most` tokens, as long as they can be, which cover all but white space between them; nothing for a text of white space.

    A word that alone has more tokens is cut by characters.
    """
    joined: list[Chunk] = []
    size = 0
    for piece, tokens in _pieces(text, Chunk(0, len(text)), most, count, (_PARAGRAPHS, _SENTENCES, _WORDS)):
        between = max(0, count(text[joined[-1].end : piece.begin]) - 1) if joined else 0  # one token for it is in each piece's own
        if joined and size + between + tokens <= most:
            joined[-1] = Chunk(joined[-1].begin, piece.end)
            size += between + tokens
        else:
            joined.append(piece)
            size = tokens
    return joined


def _pieces(text: str, whole: Chunk, most: int, count: CountTokens, borders: tuple[re.Pattern[str], ...]) -> Iterator[tuple[Chunk, int]]:
    """The largest pieces that are short enough, each with its tokens and one more for what joins it to the next."""
    part = text[whole.begin : whole.end]
    begin = whole.begin + len(part) - len(part.lstrip())
    whole = Chunk(begin, begin + len(part.strip()))
    if whole.begin >= whole.end:
        return
    tokens = count(text[whole.begin : whole.end]) + 1
    if tokens <= most:
        yield whole, tokens
    elif not borders:
        half = (whole.begin + whole.end) // 2
        if half == whole.begin:
            yield whole, tokens
            return
        yield from _pieces(text, Chunk(whole.begin, half), most, count, ())
        yield from _pieces(text, Chunk(half, whole.end), most, count, ())
    else:
        begin = whole.begin
        for border in borders[0].finditer(text, whole.begin, whole.end):
            yield from _pieces(text, Chunk(begin, border.end()), most, count, borders[1:])
            begin = border.end()
        yield from _pieces(text, Chunk(begin, whole.end), most, count, borders[1:])


def counter(tokenizer: str | None) -> CountTokens:
    """How tokens are counted: by a tokenizer.json, or by bytes."""
    if tokenizer is None:
        return estimated_tokens
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(Path(tokenizer)))
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)
