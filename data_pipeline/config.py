"""What the data pipeline can be told: sources and transforms (in their own files), tokenizer, shards, executor, mixing and loading."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from regrowth.data_pipeline.source_config import Source
from regrowth.data_pipeline.transform_config import ExactDedup, MinHashDedup, Normalise, Quality, Transform
from regrowth.settings import PlainName, Settings


class TokenizerConfig(Settings):
    """A byte-level BPE trained on a sample of the curated text, or an existing tokenizer.json."""

    vocabulary: Annotated[int, Field(ge=260, le=2**31 - 1)] = 4096
    sample_megabytes: Annotated[float, Field(gt=0)] = 16.0
    path: Path | None = None
    # The encoder: "auto" takes fastokens where it is installed and gives identical ids on a sample of the corpus, else `tokenizers`.
    engine: Literal["auto", "tokenizers", "fastokens"] = "auto"


class ShardConfig(Settings):
    """How tokens lie on disk. A block (one record batch) is the unit that epochs permute."""

    block_tokens: Annotated[int, Field(ge=1024, le=2**26)] = 1 << 20
    shard_tokens: Annotated[int, Field(ge=1024)] = 1 << 27


class ExecutorConfig(Settings):
    """Where the work is done. It changes nothing of what is written, and may differ between a run and its continuation."""

    kind: Literal["local", "mpi", "slurm"] = "local"
    max_failed: Annotated[int, Field(ge=0)] = 0  # items of the sources that may fail for good; they are left out, and named
    attempts: Annotated[int, Field(ge=1)] = 3  # of a task whose process dies
    # Slurm only.
    throttle: Annotated[int, Field(ge=1)] | None = None  # tasks running at once
    partition: str | None = None
    account: str | None = None
    minutes: Annotated[int, Field(ge=1)] = 240
    cpus_per_task: Annotated[int, Field(ge=1)] = 1
    memory_gigabytes: Annotated[float, Field(gt=0)] | None = None  # per task; None leaves it to the cluster
    setup: list[str] = []  # shell lines before each task: modules, environments


class DataConfig(Settings):
    """From raw documents to a corpus of shards."""

    out: Path = Path("prepared")
    name: PlainName = "corpus"
    folder: Path | None = None  # the corpus's own folder, instead of one below `out` named by the fingerprint
    sources: list[Source]
    transforms: list[Transform] = [Normalise(kind="normalise"), Quality(kind="quality"), ExactDedup(kind="exact_dedup")]
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    tokenizer: TokenizerConfig = TokenizerConfig()
    shards: ShardConfig = ShardConfig()
    item_megabytes: Annotated[float, Field(gt=0)] = 64.0  # large inputs are split, small files grouped, to pieces of about this size
    workers: Annotated[int, Field(ge=1)] = 2
    executor: ExecutorConfig = ExecutorConfig()
    seed: int = 0

    @field_validator("sources")
    @classmethod
    def _some_source(cls, value: list[Source]) -> list[Source]:
        if not value:
            raise ValueError("name at least one [[data.sources]]")
        return value

    @field_validator("transforms")
    @classmethod
    def _each_dedup_once(cls, value: list[Transform]) -> list[Transform]:
        for kind, name in ((ExactDedup, "exact_dedup"), (MinHashDedup, "minhash_dedup")):
            if sum(isinstance(t, kind) for t in value) > 1:
                raise ValueError(f"{name} stands twice; once is enough")
        return value


class DataRecipe(BaseModel):
    """The `[data]` section of a recipe; the other sections are not this room's business and are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: DataConfig


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
