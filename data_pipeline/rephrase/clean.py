"""What a model answered, without what it says around it; or why it is no rephrase."""

import random
import re

from regrowth.data_pipeline.rephrase.cache import Answer
from regrowth.data_pipeline.rephrase.chunks import CountTokens, estimated_tokens
from regrowth.data_pipeline.rephrase.prompts import After

_OPENER = r"(?:sure|certainly|of course|absolutely|okay|ok)\b[,.!:]?"
_ABOUT_IT = (
    r"(?:here(?:'s|’s| is| are)|below (?:is|are)|the following is)\b[^\n:]{0,120}"
    r"\b(?:paraphras|rephras|rewrit|reword|retold|simplif|version|summar|(?:the|your) text)[^\n:]{0,80}:"
)
# "Sure! I would be glad to.", alone on its line, and "Here is a paraphrase of it:"; whatever else begins so belongs to the text.
_PREFACE = re.compile(
    rf"^(?:{_OPENER}(?:[ \t]*I(?:['’]d|['’]ll| would| will| can)\b[^\n]{{0,80}})?[ \t]*\n+|{_OPENER}[ \t]+(?={_ABOUT_IT}))?(?:{_ABOUT_IT}\s*)?",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\n\s*(?:i hope (?:this|that)|let me know|please let me know|feel free to|is there anything else|would you like me)\b[^\n]*\s*$",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am) (?:sorry|afraid|unable|not able)|i (?:cannot|can't|can not|won't|will not)\b|sorry\b|as an? (?:ai|language model)|unfortunately, i\b|"
    r"i apologi[sz]e)", re.IGNORECASE
)  # fmt: skip
_MARKDOWN = (
    (re.compile(r"^\s*```[^\n]*$", re.MULTILINE), ""),
    (re.compile(r"^ {0,3}#{1,6}\s+", re.MULTILINE), ""),
    (re.compile(r"^(\s*)[*+-]\s+", re.MULTILINE), r"\1"),
    (re.compile(r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])"), r"\1"),
    (re.compile(r"`([^`\n]+)`"), r"\1"),
    (re.compile(r"\[([^\]\n]+)\]\((?:[^()\s]+)\)"), r"\1"),
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»"}
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][\w’'-]{2,}")
_NAMELIKE = re.compile(r"[A-Z][\w’'-]{2,}")
_WORD = re.compile(r"\w+")
_RUN = 8  # words
_PAIR = re.compile(r"^[ \t]*(?:[(\[]?[0-9A-Za-z]{1,3}[.):\]]+[ \t]*)?Question(?: \d+)?:", re.MULTILINE | re.IGNORECASE)
_TOKENS_A_PAIR = 15  # of the source, for each pair that may be kept (Nemotron-CC: ten for each 150)


def clean(answer: Answer, source: str, after: After, count: CountTokens = estimated_tokens) -> tuple[str, str]:
    """(the rephrase, "") or (what was said, why it is dropped).

    Reasons: error (that may not come again), rejected (by the server, and would be again), cut_off, no_prefix, refusal, form, too_short, copied, numbers_lost, names_lost.
    """
    if answer.error:
        return answer.error, "error" if answer.transient else "rejected"
    said = answer.text.strip()
    if answer.finish == "length":
        return said, "cut_off"
    text = said
    if after.prefix:
        begun = next((it for it in map(_bare, (said, _without_preface(said))) if it.lower().startswith(after.prefix.lower())), None)
        if begun is None:
            return said, "refusal" if _REFUSAL.match(text) else "no_prefix"
        text = begun[len(after.prefix) :].lstrip("*_: ")
    if _REFUSAL.match(text.strip()):
        return said, "refusal"
    text = tidy(text, after)
    if not all(part in text for part in after.must_hold):
        return said, "form"
    if count(text) < after.min_tokens:
        return said, "too_short"
    if copied_share(text, source) > after.max_copied:
        return said, "copied"
    if kept_share(set(_NUMBER.findall(source)), set(_NUMBER.findall(text))) < after.keep_numbers:
        return said, "numbers_lost"
    if kept_share(set(_NAME.findall(source)), set(_NAMELIKE.findall(text))) < after.keep_names:
        return said, "names_lost"
    return text, ""


def some_pairs(text: str, source_tokens: int, seed: str) -> str:
    """Of the questions with their answers, a number drawn between 1 and ten for each 150 tokens of the source, in an order that is drawn (Nemotron-CC, arXiv 2412.02595);
    "" where no line begins with a question."""
    begins = [found.start() for found in _PAIR.finditer(text)]
    if not begins:
        return ""
    pairs = [text[begin:end].strip() for begin, end in zip(begins, [*begins[1:], len(text)], strict=True)]
    chance = random.Random(seed)
    chance.shuffle(pairs)
    return "\n\n".join(pairs[: chance.randint(1, max(1, source_tokens // _TOKENS_A_PAIR))])


def tidy(text: str, after: After) -> str:
    """Without prefaces ("Here is ...:"), closing words, quotation marks around it all, and markup."""
    text = _CLOSING.sub("", _without_preface(text.strip())).strip()
    if after.markdown == "strip":
        for pattern, plain in _MARKDOWN:
            text = pattern.sub(plain, text)
    text = text.strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text.count(text[-1]) <= 2:
        text = text[1:-1].strip()
    return re.sub(r"\n{3,}", "\n\n", text)


def _without_preface(text: str) -> str:
    preface = _PREFACE.match(text)
    return text[preface.end() :] if preface else text


def _bare(text: str) -> str:
    """Without markup at its beginning."""
    return text.lstrip("*_#> \n")


def copied_share(text: str, source: str) -> float:
    """Of the text's runs of eight words, those that stand in the source; 0 where it has none."""
    words, theirs = ([word.lower() for word in _WORD.findall(it)] for it in (text, source))
    runs = {tuple(theirs[i : i + _RUN]) for i in range(len(theirs) - _RUN + 1)}
    mine = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return sum(run in runs for run in mine) / len(mine) if mine else 0.0


def kept_share(wanted: set[str], found: set[str]) -> float:
    """Of what is to be kept, what is there; 1 where there is nothing to keep."""
    return len(wanted & found) / len(wanted) if wanted else 1.0
