"""What the data pipeline can be told: sources and transforms (in their own files), tokenizer, shards, executor and loading."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from regrowth.data_pipeline.mixing.reweight import Reweight
from regrowth.data_pipeline.source_config import Source
from regrowth.data_pipeline.transform_config import (
    C4,
    Boilerplate,
    ExactDedup,
    FixUnicode,
    LineDedup,
    MaskPii,
    MinHashDedup,
    Normalise,
    Quality,
    Rephrase,
    Transform,
)
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
    weight: str | None = (
        None  # the score that a training document's tokens are weighed by in the loss, 1 where it has none; None: all weigh 1
    )


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
    gpus_per_task: Annotated[int, Field(ge=0)] = 0  # of the tasks that rephrase: for the server that each starts, or its model
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

    @field_validator("transforms")
    @classmethod
    def _what_was_rephrased_stays(cls, value: list[Transform]) -> list[Transform]:
        first = next((number for number, t in enumerate(value) if isinstance(t, Rephrase)), len(value))
        for late in value[first + 1 :]:
            if isinstance(late, Normalise | FixUnicode | Boilerplate | MaskPii | C4 | LineDedup | Rephrase):
                raise ValueError(f"{late.kind} stands behind rephrase, and would change texts that rephrases were made from; put it before")
        return value


class DataRecipe(BaseModel):
    """The `[data]` section of a recipe; the other sections are not this room's business and are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: DataConfig


class LengthStage(Settings):
    """Shorter sequences from a step on."""

    at_step: Annotated[int, Field(ge=0)]
    sequence_length: Annotated[int, Field(ge=8)]


class LoaderConfig(Settings):
    """Which sequences make a step, independent of the number of ranks. Length, unit, packing and seed are constants of a run."""

    corpus: str | None = None  # the run's own corpus if it is finished already, a folder or an address; None: it is prepared from [data]
    corpora: list[str] = []  # finished corpora besides the run's own, folders or addresses, of the same tokenizer; their domains join
    cache: Path | None = None  # where blocks of corpora at addresses are kept; None: in the user's cache folder
    cache_gigabytes: Annotated[float, Field(gt=0)] = 100.0

    sequence_length: Annotated[int, Field(ge=8)] = 256
    global_batch: Annotated[int, Field(ge=1)] = 32  # sequences per step
    unit_sequences: Annotated[int, Field(ge=1)] = 4  # sequences of one domain per draw of the policy
    update_delay: Annotated[int, Field(ge=1)] = 2  # steps between a loss and the draw it may influence; from 2 on, nobody waits for a batch
    length_schedule: list[
        LengthStage
    ] = []  # sequences cut into shorter ones, as many more of them; the order and the tokens of a step stay
    packing: Literal["chunk", "best_fit", "fixed"] = "chunk"  # data_pipeline/packing.py says what each wastes
    prefetch: Annotated[int, Field(ge=0)] = 2  # steps whose batches are built ahead, in a thread; 0: none
    reweight: Reweight | None = None  # topics weigh in the loss by how hard they are (ToReMi); None: all weigh alike
    damaged: Literal["stop", "skip"] = (
        "stop"  # what to do with a block that does not match its hash: end the run, or train on without its tokens
    )
    seed: int = 0

    @model_validator(mode="after")
    def _order_known_without_reading(self) -> "LoaderConfig":
        if self.damaged == "skip" and self.packing == "best_fit":
            raise ValueError(
                'damaged = "skip" needs packing = "chunk" or "fixed": how many sequences a block has under best_fit is only known from the block'
            )
        return self

    @model_validator(mode="after")
    def _lengths_divide(self) -> "LoaderConfig":
        steps = [stage.at_step for stage in self.length_schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"length_schedule: at_step = {steps}: stages stand in ascending order")
        for stage in self.length_schedule:
            if self.sequence_length % stage.sequence_length:
                raise ValueError(
                    f"length_schedule: {stage.sequence_length} at step {stage.at_step} does not divide sequence_length = {self.sequence_length}"
                )
        return self

    def length_at(self, step: int) -> int:
        """The length of the sequences that are trained on in a step."""
        lengths = [stage.sequence_length for stage in self.length_schedule if stage.at_step <= step]
        return lengths[-1] if lengths else self.sequence_length

    @model_validator(mode="after")
    def _units_fill_the_batch(self) -> "LoaderConfig":
        if self.global_batch % self.unit_sequences:
            raise ValueError(
                f"global_batch = {self.global_batch} is not a multiple of unit_sequences = {self.unit_sequences}; "
                f"choose unit_sequences from {', '.join(str(d) for d in range(1, self.global_batch + 1) if self.global_batch % d == 0)}"
            )
        return self
