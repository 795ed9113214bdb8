"""What the data pipeline can be told: sources, transforms, tokenizer, shards, mixing and loading."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from regrowth.settings import PlainName, Settings

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class InstalledSource(Settings):
    """The text that this Python installation carries: three domains (code, docs, reference), offline, on every machine."""

    kind: Literal["installed"]
    max_megabytes: Annotated[float, Field(gt=0)] | None = None  # per domain, None for all there is


class TextSource(Settings):
    """A folder of text files, one document a file, or one text file."""

    kind: Literal["text"]
    path: Path
    domain: str | None = None  # None: the name of the folder just below `path`
    suffixes: list[str] = [".txt", ".md", ".rst"]


class JsonlSource(Settings):
    """JSON lines, plain or packed (.gz, .zst, .xz, .bz2), one document a line; a file, a folder or a glob."""

    kind: Literal["jsonl"]
    path: Path
    text_key: str = "text"
    domain: str | None = None  # None: the row's `domain_key`, else the file's name
    domain_key: str = "domain"
    max_megabytes: Annotated[float, Field(gt=0)] | None = None  # of text, per file
    max_line_megabytes: Annotated[float, Field(gt=0)] = 16.0  # a longer line is dropped, by name


class ParquetSource(Settings):
    """Parquet files, one document a row; a file, a folder or a glob."""

    kind: Literal["parquet"]
    path: Path
    text_key: str = "text"
    domain: str | None = None
    domain_key: str = "domain"


class DatasetsSource(Settings):
    """A dataset that Hugging Face `datasets` can load: a hub name, or a folder saved with `save_to_disk`."""

    kind: Literal["datasets"]
    path: str
    name: str | None = None
    split: str = "train"
    text_key: str = "text"
    domain: str | None = None
    domain_key: str = "domain"
    max_documents: Annotated[int, Field(gt=0)] | None = None


Source = Annotated[InstalledSource | TextSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="kind")]


class Normalise(Settings):
    """Unicode NFC, line ends to LF, control characters removed, trailing spaces and runs of blank lines trimmed."""

    kind: Literal["normalise"]


class Quality(Settings):
    """Drop what is not readable text: too short, too long, binary, or the same line over and over."""

    kind: Literal["quality"]
    min_characters: Annotated[int, Field(ge=0)] = 100
    max_characters: Annotated[int, Field(gt=0)] = 2_000_000
    max_line_characters: Annotated[int, Field(gt=0)] = 100_000
    max_replacement_fraction: Fraction = 0.01  # U+FFFD, which stands where bytes were not UTF-8
    min_alphabetic_fraction: Fraction = 0.25
    # Of non-blank lines that repeat an earlier one. Gopher has .30 for prose (arXiv 2112.11446, table A1); source code repeats more.
    max_duplicate_line_fraction: Fraction = 0.50


class ExactDedup(Settings):
    """Keep the first document of each content hash (xxh3-128 of the normalised text), over all sources."""

    kind: Literal["exact_dedup"]


Transform = Annotated[Normalise | Quality | ExactDedup, Field(discriminator="kind")]


class TokenizerConfig(Settings):
    """A byte-level BPE trained on a sample of the curated text, or an existing tokenizer.json."""

    vocabulary: Annotated[int, Field(ge=260, le=2**31 - 1)] = 4096
    sample_megabytes: Annotated[float, Field(gt=0)] = 16.0
    path: Path | None = None


class ShardConfig(Settings):
    """How tokens lie on disk. A block (one record batch) is the unit that epochs permute."""

    block_tokens: Annotated[int, Field(ge=1024, le=2**26)] = 1 << 20
    shard_tokens: Annotated[int, Field(ge=1024)] = 1 << 27


class DataConfig(Settings):
    """From raw documents to a corpus of shards."""

    out: Path = Path("prepared")
    name: PlainName = "corpus"
    sources: list[Source]
    transforms: list[Transform] = [Normalise(kind="normalise"), Quality(kind="quality"), ExactDedup(kind="exact_dedup")]
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    tokenizer: TokenizerConfig = TokenizerConfig()
    shards: ShardConfig = ShardConfig()
    workers: Annotated[int, Field(ge=1)] = 2
    seed: int = 0

    @field_validator("sources")
    @classmethod
    def _some_source(cls, value: list[Source]) -> list[Source]:
        if not value:
            raise ValueError("name at least one [[data.sources]]")
        return value


class StaticMixing(Settings):
    """Fixed shares per domain; None means each domain's share of the corpus's tokens."""

    policy: Literal["static"] = "static"
    weights: dict[str, float] | Literal["natural", "uniform"] = "natural"

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: dict[str, float] | str) -> dict[str, float] | str:
        return check_weights(value) if isinstance(value, dict) else value


class OdmMixing(Settings):
    """Online data mixing: an EXP3-like bandit over domains (Albalak et al. 2023, arXiv 2312.02406)."""

    policy: Literal["odm"]
    form: Literal["paper", "released"] = "paper"
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9  # smoothing of the rewards
    warmup_steps: Annotated[int, Field(ge=0)] = 20  # at the initial mixture
    initial: dict[str, float] | Literal["natural", "uniform"] = "natural"
    # Where the rewards start: zero as published (a domain unseen early then collapses to the floor), or at the domain's first loss.
    initial_reward: Literal["zero", "first_loss"] = "first_loss"

    @field_validator("initial")
    @classmethod
    def _positive(cls, value: dict[str, float] | str) -> dict[str, float] | str:
        return check_weights(value) if isinstance(value, dict) else value


Mixing = Annotated[StaticMixing | OdmMixing, Field(discriminator="policy")]


class LoaderConfig(Settings):
    """Which sequences make a step. All of these are constants of a run, independent of the number of ranks."""

    sequence_length: Annotated[int, Field(ge=8)] = 256
    global_batch: Annotated[int, Field(ge=1)] = 32  # sequences per step
    unit_sequences: Annotated[int, Field(ge=1)] = 4  # sequences of one domain per draw of the policy
    update_delay: Annotated[int, Field(ge=1)] = 1  # steps between a loss and the draw it may influence
    seed: int = 0

    @model_validator(mode="after")
    def _units_fill_the_batch(self) -> "LoaderConfig":
        if self.global_batch % self.unit_sequences:
            raise ValueError(
                f"global_batch = {self.global_batch} is not a multiple of unit_sequences = {self.unit_sequences}; "
                f"choose unit_sequences from {', '.join(str(d) for d in range(1, self.global_batch + 1) if self.global_batch % d == 0)}"
            )
        return self


def check_weights(weights: dict[str, float]) -> dict[str, float]:
    """Weights are shares: positive, finite, and they sum to 1."""
    for domain, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of {domain} is {weight}; shares are finite and not negative")
    if abs(total := sum(weights.values()) - 1.0) > 1e-3:
        raise ValueError(f"the weights sum to {total + 1.0:.4g}; they are shares and sum to 1")
    return weights
