"""What can be said of models that judge documents, and of selectors; defaults are the published values, with their source."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from regrowth.settings import PlainName, Settings

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Losses(Settings):
    """How models' losses on documents are taken. Window and stride are PreSelect's (arXiv 2503.00808): a window of 1900 tokens moves on by 512, and what it saw before is context."""

    window: Annotated[int, Field(ge=2)] = 1900  # tokens; less where a model's context is shorter
    stride: Count = 512
    batch_tokens: Count | None = None  # of a forward pass, padding included; None: by the device
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    at_once: Count | None = None  # models that are held in memory; None: all
    cache: Path = Path("losses.sqlite")  # losses that were taken, which outlive this corpus

    @model_validator(mode="after")
    def _overlap(self) -> "Losses":
        if self.stride >= self.window:
            raise ValueError(
                f"stride = {self.stride} is not less than window = {self.window}: a window would begin with a token that nothing stands before"
            )
        return self


class FastTextTraining(Settings):
    """Of a classifier; what is not said is the library's default."""

    epochs: Count = 3
    lr: Annotated[float, Field(gt=0)] = 0.1
    word_ngrams: Count = 2
    dim: Count = 100
    buckets: Annotated[int, Field(ge=1024)] = 2_000_000
    min_count: Count = 1
    quantise: bool = False  # write a small copy of the model as well (.ftz)
    heldout: Fraction = 0.1  # of the examples, which the classifier is held to
    calibrate: bool = (
        False  # give probabilities as the held-out examples bear them out (Platt), not as fastText says them; the order is the same
    )
    seed: Seed = 0


class SelectorSettings(Settings):
    """What every selector has. `needs_target` says whether it is fitted to the target's text."""

    inputs: ClassVar[tuple[str, ...]] = ()  # keys that name files
    models: ClassVar[tuple[str, ...]] = ()  # keys that name language models
    needs_target: ClassVar[bool] = False


class Random(SelectorSettings):
    """Documents by chance."""

    kind: Literal["random"]
    seed: Seed = 0


class LengthMatched(SelectorSettings):
    """Documents by chance, as long as those that another selector would take: what is left of that selector's gain is not length."""

    kind: Literal["length_matched"]
    like: Path  # a fitted selector's folder
    fraction: Fraction = 0.1  # that it would keep, of characters
    seed: Seed = 0


class Perplexity(SelectorSettings):
    """By how well a model knows a document: CCNet's way (arXiv 1911.00359) takes the lowest, BERTIN's (arXiv 2207.06814) draws around the middle."""

    models = ("model",)

    kind: Literal["perplexity"]
    model: str
    prefer: Literal["low", "high", "gaussian", "stepwise"] = "low"
    width: Annotated[float, Field(gt=0)] = 4.5  # of the gaussian, in (perplexity - median) / median
    losses: Losses = Losses()
    sample: Count = 2000  # documents of the pool that quartiles are taken from
    seed: Seed = 0


class Classifier(SelectorSettings):
    """DCLM's way (arXiv 2406.11794): fastText tells what is wanted from what is not."""

    inputs = ("positives", "negatives", "labelled")

    kind: Literal["classifier"]
    positives: Path | None = None  # jsonl with `text`; None: the target's training text
    negatives: Path | None = None  # jsonl with `text`; None: documents of the pool, drawn at random
    labelled: Path | None = None  # jsonl with `text` and `label`, instead of both
    positive_label: str = "1"
    examples: Count = 200_000  # of each class, at most
    training: FastTextTraining = FastTextTraining(epochs=5)

    @property
    def needs_target(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether positives are the target's text."""
        return self.positives is None and self.labelled is None


class Regression(SelectorSettings):
    """FineWeb-Edu's way (arXiv 2406.17557): a ridge regression of people's or a model's scores on a sentence model's embeddings."""

    inputs = ("labelled",)
    models = ("model",)

    kind: Literal["regression"]
    model: str  # a transformers model, whose last states are averaged
    labelled: Path  # jsonl with `text` and a number
    field: str = "score"
    ridge: Annotated[float, Field(ge=0)] = 1.0
    heldout: Fraction = 0.1
    characters: Count = 2000  # of a document's beginning
    device: str = "auto"
    seed: Seed = 0


class Importance(SelectorSettings):
    """DSIR (arXiv 2302.03169): hashed unigrams and bigrams, weighed by how much likelier the target makes them than the pool; drawn without replacement (Gumbel)."""

    needs_target = True

    kind: Literal["importance"]
    buckets: Annotated[int, Field(ge=2)] = 10_000
    per_ngram: bool = False  # the mean log ratio of a document's n-grams instead of their sum, so that length counts for nothing
    chance: bool = True  # draw in proportion to the weights; else take the greatest
    seed: Seed = 0


class Difference(SelectorSettings):
    """MiniPLM (arXiv 2410.17215): the mean over tokens of how much better a large model knows them than a small one. Both have one tokenizer."""

    models = ("teacher", "reference")

    kind: Literal["difference"]
    teacher: str
    reference: str
    losses: Losses = Losses()


class PreSelect(SelectorSettings):
    """PreSelect (arXiv 2503.00808): documents on which models' losses are ordered as their scores are teach fastText what to look for."""

    kind: Literal["preselect"]
    models_file: Path  # a TOML list of models with scores (`ModelSet`)
    target: str | None = None  # whose scores order the models, where the file has several
    losses: Losses = Losses()
    per: Literal["domain", "host"] = "host"  # groups of the pool
    groups: Count = 3000
    documents: Count = 300  # of each group
    labels: Literal["document", "group"] = "document"  # whether a document or its group's mean is called good or bad
    weights: Literal["pairs", "gaps"] = "pairs"  # a pair of models counts one, or the distance of their scores
    confidence: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # positives must be whole in so many bootstraps of the models' pairs; 0: none is taken
    )
    positive_share: Fraction | None = None  # the best so many are positives; None: those of full strength alone
    training: FastTextTraining = FastTextTraining()
    seed: Seed = 0

    @model_validator(mode="after")
    def _confidence_parts_something(self) -> "PreSelect":
        if self.confidence and self.positive_share is None and self.labels == "document":
            raise ValueError(
                "preselect: confidence: documents of full strength are whole in every bootstrap; say with positive_share which others may be positives"
            )
        return self


SelectorConfig = Annotated[
    Random | LengthMatched | Perplexity | Classifier | Regression | Importance | Difference | PreSelect, Field(discriminator="kind")
]


class ScoredModel(Settings):
    """A model and how well it does what is wanted."""

    name: PlainName
    path: str  # a folder of a transformers model
    scores: dict[str, float]  # by target


class ModelSet(Settings):
    """Models with scores, as `models_file` has them."""

    higher_is_better: bool = True
    models: list[ScoredModel]

    @field_validator("models")
    @classmethod
    def _two_different(cls, value: list[ScoredModel]) -> list[ScoredModel]:
        names = [model.name for model in value]
        if len(value) < 2:
            raise ValueError(f"{len(value)} model is named; an order needs at least two")
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"the name {', '.join(sorted(doubled))} stands twice")
        return value


class SelectorChoice(Settings):
    """A selector in a recipe."""

    selectors: dict[PlainName, SelectorConfig] = {}


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON-able values."""
    return config.model_dump(mode="json")


_WORK = {"device", "batch_tokens", "at_once", "cache"}  # says who does the work, and changes nothing of what comes out but by rounding


def essence(config: Any) -> dict[str, Any]:
    """A config's values without those that only say how the work is done."""
    values = {key: value for key, value in plain(config).items() if key not in _WORK}
    if "losses" in values:
        values["losses"] = {key: value for key, value in values["losses"].items() if key not in _WORK}
    return values
