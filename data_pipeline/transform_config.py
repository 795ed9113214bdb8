"""What can be said of a transform; defaults are the published values, with their source."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from regrowth.data_pipeline.rephrase.config import LocalModelConfig, ServerConfig
from regrowth.data_pipeline.select.config import Losses
from regrowth.settings import PlainName, Settings

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Words = Annotated[int, Field(ge=1, le=64)]


class TransformSettings(Settings):
    """What every transform has. `inputs` names the keys that are paths of files: they must be there, and their content is part of the recipe. `work` names those that say who
    does the work, and how much at once: they are no part of it."""

    inputs: ClassVar[tuple[str, ...]] = ()
    work: ClassVar[tuple[str, ...]] = ()


class Normalise(TransformSettings):
    """Unicode NFC, line ends to LF, control characters removed, trailing spaces and runs of blank lines trimmed."""

    kind: Literal["normalise"]


class FixUnicode(TransformSettings):
    """Repair text decoded with the wrong encoding, and HTML entities (ftfy, whose defaults these are)."""

    kind: Literal["fix_unicode"]
    uncurl_quotes: bool = True  # typographic quotation marks to straight ones
    fix_latin_ligatures: bool = True
    fix_character_width: bool = True  # fullwidth Latin letters to plain ones


class Quality(TransformSettings):
    """Drop what is not readable text: too short, too long, binary, or the same line over and over."""

    kind: Literal["quality"]
    min_characters: Count = 100
    max_characters: Annotated[int, Field(gt=0)] = 2_000_000
    max_line_characters: Annotated[int, Field(gt=0)] = 100_000
    max_replacement_fraction: Fraction = 0.01  # U+FFFD, which stands where bytes were not UTF-8
    min_alphabetic_fraction: Fraction = 0.25
    # Of non-blank lines that repeat an earlier one. Gopher has .30 for prose (arXiv 2112.11446, table A1); source code repeats more.
    max_duplicate_line_fraction: Fraction = 0.50


class Language(TransformSettings):
    """Keep documents in some languages (FineWeb: score of at least .65, arXiv 2406.17557)."""

    inputs = ("model",)

    kind: Literal["language"]
    keep: list[str] = ["en"]  # ISO 639-1 codes, as the model spells them
    min_score: Fraction = 0.65
    model: str | None = None  # a fastText model (lid.176.bin, GlotLID, ...); None: py3langid, which carries its own


class GopherQuality(TransformSettings):
    """Does it read like prose? (Rae et al. 2021, arXiv 2112.11446, section A1.1)"""

    kind: Literal["gopher_quality"]
    min_words: Count = 50
    max_words: Count = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbol_ratio: float = 0.1  # "#" per word, and ellipses per word
    max_bullet_lines: Fraction = 0.9
    max_ellipsis_lines: Fraction = 0.3
    min_letter_words: Fraction = 0.8
    min_stop_words: Count = 2
    stop_words: Annotated[list[str], Field(max_length=64)] = ["the", "be", "to", "of", "and", "that", "have", "with"]


class GopherRepetition(TransformSettings):
    """Does it say the same over and over? (Rae et al. 2021, arXiv 2112.11446, table A1)"""

    kind: Literal["gopher_repetition"]
    max_repeated_lines: Fraction = 0.30
    max_repeated_paragraphs: Fraction = 0.30
    max_repeated_line_characters: Fraction = 0.20
    max_repeated_paragraph_characters: Fraction = 0.20
    top_ngrams: dict[Words, Fraction] = {2: 0.20, 3: 0.18, 4: 0.16}
    repeated_ngrams: dict[Words, Fraction] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class C4(TransformSettings):
    """C4's line and page rules (Raffel et al. 2020, arXiv 1910.10683, section 2.2)."""

    kind: Literal["c4"]
    min_sentences: Count = 5
    min_words_per_line: Count = 3
    max_word_characters: Count = 1000
    terminal_punctuation: bool = True  # lines must end in . ? ! " or '
    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True
    remove_citations: bool = True
    line_phrases: list[str] = [  # lines that hold one go
        "javascript",
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    ]


class FineWeb(TransformSettings):
    """FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557, section 3.6)."""

    kind: Literal["fineweb"]
    min_terminal_lines: Fraction = 0.12
    max_short_lines: Fraction = 0.67
    short_line_characters: Count = 30
    max_repeated_line_characters: Fraction = 0.01
    max_newlines_per_word: float = 0.3


class Boilerplate(TransformSettings):
    """Remove short lines that are a page's furniture (menus, consent banners, share buttons); drop pages that are mostly that."""

    kind: Literal["boilerplate"]
    max_line_words: Count = 12  # a longer line is prose that happens to mention it
    patterns: list[str] = []  # more regular expressions (RE2, without case), beside the built-in ones
    max_removed_fraction: Fraction = 0.5


class FastTextScore(TransformSettings):
    """Score documents with a fastText classifier; with a threshold, drop those below."""

    inputs = ("model",)

    kind: Literal["fasttext"]
    model: str
    label: str = "__label__1"
    name: PlainName = "quality"  # the score's name
    min_score: float | None = None
    scored_characters: Annotated[int, Field(gt=0)] | None = None  # of each document's beginning; None for all


class UrlFilter(TransformSettings):
    """Drop documents by where they come from."""

    inputs = ("domains", "urls", "words")

    kind: Literal["url"]
    domains: str | None = None  # a file of host names, one a line; hosts below them are meant too
    urls: str | None = None  # a file of addresses
    words: str | None = None  # a file of words that must not stand in an address
    require_url: bool = False


class MaskPii(TransformSettings):
    """Replace e-mail addresses, public IP addresses and telephone numbers by stand-ins; how many is kept in `meta`."""

    kind: Literal["mask_pii"]
    emails: bool = True
    ips: bool = True
    phones: bool = True
    email_stand_in: str = "email@example.com"
    ip_stand_in: str = "192.0.2.1"  # reserved for documentation (RFC 5737)
    phone_stand_in: str = "555-0100"  # reserved for fiction


class BlockedWords(TransformSettings):
    """Drop documents that hold blocked words or phrases."""

    inputs = ("path",)

    kind: Literal["blocked_words"]
    path: str  # a file, one word or phrase a line; "#" begins a comment
    max_occurrences: Count = 0


class Decontaminate(TransformSettings):
    """Drop documents that share word n-grams with evaluation sets (13 words: GPT-3, arXiv 2005.14165, appendix C)."""

    kind: Literal["decontaminate"]
    path: str  # JSON lines of evaluation items: a file, a folder or a glob
    fields: list[str] = ["query", "question", "text", "context", "prompt", "passage", "choices", "answer"]
    words: Annotated[int, Field(ge=3, le=64)] = 13
    shortest: Annotated[int, Field(ge=3)] = 8  # an item of 8 to 12 words is compared whole; shorter ones are not checked, and counted
    max_shared: Count = 0


Styles = dict[str, Annotated[float, Field(gt=0)]]  # a document gets one of them, by these weights


class StyleRule(Settings):
    """Styles for some documents: those of some domains, or with a score in a range."""

    styles: Styles = {}  # {}: they are left as they are
    domains: list[str] = []  # [] for all
    score: str | None = None  # a score's name, as a classifier before gave it; documents without it do not fit
    at_least: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _bounds_are_of_a_score(self) -> "StyleRule":
        if self.score is None and (self.at_least is not None or self.below is not None):
            raise ValueError("rules: at_least and below are bounds of a score; name it with score")
        return self


class Similarity(Settings):
    """What a model in this process says of source and rephrase; below `least`, the rephrase is dropped."""

    path: str  # a folder, or a name on the Hub
    kind: Literal["embedding", "entailment"] = "embedding"  # the cosine of mean embeddings; the chance that the source entails it
    least: float
    device: str = "auto"


class Rephrase(TransformSettings):
    """Ask a language model to write documents anew (WRAP, arXiv 2401.16380). What it wrote follows its source, as a document of its own in a domain of its own."""

    inputs = ("tokenizer",)
    work = ("server", "local", "cache", "budget_tokens")

    kind: Literal["rephrase"]
    server: ServerConfig | None = None
    local: LocalModelConfig | None = None  # instead of a server
    styles: Styles = {"medium": 1.0}
    rules: list[StyleRule] = []  # the first that fits a document takes the place of `styles`
    domains: list[str] = []  # that are rephrased; [] for all
    keep_source: bool = True  # else what was rephrased, or could not be, is dropped
    domain: str = "{domain}_rephrased"  # of what was written; {domain} and {style} are filled in
    prompts: Path | None = None  # a folder of prompts of one's own
    tokenizer: str | None = None  # a tokenizer.json that counts a chunk's tokens; None: a quarter of its bytes
    language: str = "same"  # of what was written: "same" as the source's, "any", or a code ("en")
    similarity: Similarity | None = None
    cache: Path = Path("rephrased.sqlite")  # answers, which outlive this corpus: nothing is asked twice
    budget_tokens: Annotated[int, Field(ge=1)] | None = None  # that all answers in the cache may have cost
    retry_errors: bool = False  # ask again what failed before; makes another corpus, whose good answers are in the cache

    @property
    def engine(self) -> ServerConfig | LocalModelConfig:
        """What answers."""
        engine = self.server or self.local
        assert engine is not None
        return engine

    @property
    def all_styles(self) -> list[str]:
        """That a document may get."""
        return list(dict.fromkeys([*self.styles, *(style for rule in self.rules for style in rule.styles)]))

    @field_validator("domain")
    @classmethod
    def _can_be_filled_in(cls, value: str) -> str:
        try:
            value.format(domain="a", style="b")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f'"{value}" has a place for something else than {{domain}} and {{style}} ({error})') from error
        return value

    @model_validator(mode="after")
    def _one_engine_and_some_style(self) -> "Rephrase":
        if (self.server is None) == (self.local is None):
            raise ValueError("rephrase: name what answers, either [server] (urls, model) or [local] (path)")
        if not self.all_styles:
            raise ValueError("rephrase: neither styles nor rules name a style")
        return self


class ExactDedup(TransformSettings):
    """Keep the first document of each content hash (xxh3-128 of the normalised text), over all sources."""

    kind: Literal["exact_dedup"]


class MinHashDedup(TransformSettings):
    """Keep one document of each cluster of near-duplicates (FineWeb's setting: word 5-grams, 14 bands of 8; arXiv 2406.17557)."""

    kind: Literal["minhash_dedup"]
    words: Annotated[int, Field(ge=1, le=64)] = 5
    bands: Annotated[int, Field(ge=1, le=256)] = 14
    rows: Annotated[int, Field(ge=1, le=64)] = 8
    seed: int = 1
    keep: Literal["longest", "first", "best_score"] = "longest"
    score: str = "quality"  # of which `best_score` is the best


class LineDedup(TransformSettings):
    """Remove lines or paragraphs met before anywhere in the corpus, with a Bloom filter (DCLM's way, arXiv 2406.11794)."""

    kind: Literal["line_dedup"]
    unit: Literal["line", "paragraph"] = "paragraph"
    memory_megabytes: Annotated[float, Field(gt=0)] = 256.0  # of each filter
    false_positive_rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    filters: Annotated[int, Field(ge=1)] = 1  # the units are divided among them by hash, so that they fill side by side
    min_bytes: Count = 20  # shorter units are let through: headings repeat
    max_removed_fraction: Fraction = 0.8  # a document that loses more is dropped

    @model_validator(mode="after")
    def _some_probes(self) -> "LineDedup":
        if self.memory_megabytes * 1e6 < 64:
            raise ValueError("memory_megabytes is less than one filter needs; give at least 1")
        return self


class SelectorScore(TransformSettings):
    """Score documents with a fitted selector (`regrowth data select fit`); with a threshold, drop those below."""

    kind: Literal["selector"]
    path: Path  # the selector's folder
    name: PlainName | None = None  # the score's name; None: the folder's
    min_score: float | None = None  # drop documents below, and those without a score


class Strength(TransformSettings):
    """Take the losses of scored models on each document, and how well their order foretells that of the scores (PreSelect, arXiv 2503.00808)."""

    inputs = ("models_file",)

    kind: Literal["strength"]
    models_file: Path  # a TOML list of models with scores
    target: str | None = None  # whose scores order the models, where the file has several
    weights: Literal["pairs", "gaps"] = "pairs"  # a pair of models counts one, or the distance of their scores
    losses: Losses = Losses()


class KeepBest(TransformSettings):
    """Keep the documents with the highest scores: a share of all text, or so many of each group. Those without the score go."""

    inputs = ("tokenizer",)

    kind: Literal["keep_best"]
    score: str  # the name of a score that a transform before this one gives, or "random"
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None  # that is kept
    documents: Annotated[int, Field(ge=1)] | None = None  # that are kept of each group, instead of a fraction
    of: Literal["characters", "tokens", "documents"] = "characters"  # what the fraction is of
    tokenizer: str | None = None  # a tokenizer.json that counts tokens; None: a quarter of the bytes
    per: Literal["corpus", "domain", "host"] = "corpus"  # the group that documents compete in; the host is that of meta.url
    groups: Annotated[int, Field(ge=1)] | None = None  # only the groups with most documents, so many of them
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of the order among equal scores, and of a random choice

    @model_validator(mode="after")
    def _one_measure(self) -> "KeepBest":
        if (self.fraction is None) == (self.documents is None):
            raise ValueError("keep_best: say how much is kept, either by fraction or by documents (of each group)")
        return self


BatchTransform = (
    Normalise
    | FixUnicode
    | Quality
    | Language
    | GopherQuality
    | GopherRepetition
    | C4
    | FineWeb
    | Boilerplate
    | FastTextScore
    | UrlFilter
    | MaskPii
    | BlockedWords
    | Decontaminate
    | Rephrase
    | SelectorScore
    | Strength
)
GlobalTransform = ExactDedup | MinHashDedup | LineDedup | KeepBest
Transform = Annotated[BatchTransform | GlobalTransform, Field(discriminator="kind")]
