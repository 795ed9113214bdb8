"""The config of a run: one model per room, composed here. `configs/quickstart.toml` shows it filled in."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from regrowth.data_pipeline.config import DataConfig, LoaderConfig
from regrowth.data_pipeline.mixing.config import Mixing, StaticMixing
from regrowth.errors import UserError
from regrowth.kernels.recipe import FULL, PrecisionRecipe
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.growth.event import GrowthEvent
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.precision import Recipe, check_fits, load_recipe, shipped
from regrowth.pretrain.safety import SafetyConfig
from regrowth.settings import PlainName, Settings, find_recipe, load

Count = Annotated[int, Field(ge=1)]


class RunSettings(Settings):
    """Name, length and place of a run."""

    name: PlainName = "run"
    folder: Path = Path("runs")
    steps: Count = 1000
    seed: int = 0
    start_from: Path | None = None  # a checkpoint to begin with: its model, weights, moments and lineage; the data begins afresh
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic; weights and moments are fp32
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    deterministic: bool = False  # refuse operations that are not
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0  # for which a rank waits for the others in a step
    collect_every: Annotated[int, Field(ge=0)] = 100  # steps between Python's garbage collections; 0: whenever Python likes
    compile_cache: Path | None = (
        None  # with parallel.compile: where compiled kernels are kept from run to run; None: where torch keeps them
    )
    profile_from: Annotated[int, Field(ge=0)] | None = None  # the first of `profile_steps` that are profiled
    profile_steps: Count = 3
    peak_tflops: float | None = None  # of one device in the run's dtype; None: from a table of known GPUs, for MFU
    threads: Count | None = None  # of a rank on the CPU; None: the cores shared out


class OptimizerConfig(Settings):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = 3e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0  # global gradient norm
    z_loss: Annotated[float, Field(ge=0)] = 0.0


class ScheduleConfig(Settings):
    """Learning rate over the run."""

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2  # wsd: the last part, falling linearly
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    rewarm_steps: Annotated[int, Field(ge=0)] = 10  # after a growth


class PrecisionConfig(Settings):
    """A recipe by name or from a file, or one spelled out."""

    recipe: str = "full"  # the name of a shipped one, or the path of a TOML file
    custom: Recipe | None = None
    full_precision_last: Annotated[float, Field(ge=0, le=1)] | None = None  # None: the recipe's own
    # Eight-bit products by the device's matrix units ("hardware"), or rounded operands multiplied in run.dtype ("emulated"); "auto": the former where they are and gain.
    products: Literal["auto", "emulated", "hardware"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, values: Any) -> Any:
        """A file's recipe is taken into the config: the run does not change when the file does. A recipe that is named takes the place of the one that was spelled out."""
        if not isinstance(values, dict) or values.get("recipe", FULL.name) == FULL.name:
            return values
        values = {key: value for key, value in values.items() if key != "custom"}
        if str(values["recipe"]).endswith(".toml"):
            try:
                recipe = load_recipe(str(values["recipe"]))
            except UserError as error:
                raise ValueError(str(error)) from error
            return {**values, "recipe": FULL.name, "custom": recipe}
        return values

    @field_validator("recipe")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            load_recipe(value)
        except UserError as error:
            raise ValueError(str(error).removeprefix(f'precision.recipe = "{value}": ')) from error
        return value

    def build(self) -> PrecisionRecipe:
        """The recipe with its schedule."""
        from dataclasses import replace

        recipe = self.custom or load_recipe(self.recipe)
        if self.custom and recipe.name in ("full", *shipped()):
            recipe = replace(recipe, name="custom")
        return recipe if self.full_precision_last is None else replace(recipe, full_precision_last=self.full_precision_last)


class CheckpointConfig(Settings):
    """When to write checkpoints, and how many to keep."""

    every: Count = 100
    keep: Count = 2
    background: bool = True  # train on while a copy of the state is written


class EvaluationConfig(Settings):
    """Held-out bits per byte."""

    every: Count = 100
    sequences_per_domain: Count = 64  # during the run; the final evaluation reads `final_sequences_per_domain`
    final_sequences_per_domain: Count = 512


class SupervisionConfig(Settings):
    """What whoever starts the ranks does when one is lost, or hangs."""

    restarts: Annotated[int, Field(ge=0)] = 3  # in a row without a new checkpoint; after that it is given up
    backoff_seconds: Annotated[float, Field(ge=0)] = 1.0  # before the first start anew; twice as long before each further one
    backoff_limit_seconds: Annotated[float, Field(ge=0)] = 300.0
    hang_seconds: Annotated[float, Field(gt=0)] | None = (
        None  # of silence of all ranks in a step; None: by how long steps take, 30 at least
    )
    health_check: bool = True  # of arithmetic, memory and disk on every node, before each start of the ranks
    straggler_every: Annotated[int, Field(ge=0)] = 100  # steps between looks at how fast each rank is by itself; 0: never
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5  # times the median of all ranks
    elastic: bool = (
        False  # in a Slurm job of which too few nodes are left: go on with fewer data-parallel ranks, until it is in the queue again
    )
    on_failure: str | None = None  # shell commands, with REGROWTH_RUN and REGROWTH_MESSAGE set: when the run is given up
    on_end: str | None = None  # when it is finished


class RunConfig(Settings):
    """Everything a run is."""

    run: RunSettings = RunSettings()
    data: DataConfig | None = None  # not looked at if loader.corpus names a finished corpus
    loader: LoaderConfig = LoaderConfig()
    mixing: Mixing = StaticMixing()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    growth: list[GrowthEvent] = []
    parallel: ParallelPlan = ParallelPlan()
    safety: SafetyConfig = SafetyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    def with_fewer_replicas(self, ranks: int) -> "RunConfig | None":
        """The same run on at most so many ranks: fewer data-parallel ones, equal batches in an equal order. None if the plan cannot have so few."""
        fewer = self.parallel.with_fewer_replicas(ranks, self.model, self.loader.sequence_length, self.loader.global_batch)
        return self.model_copy(update={"parallel": fewer}) if fewer else None

    @model_validator(mode="after")
    def _rooms_fit_together(self) -> "RunConfig":
        if self.data is None and self.loader.corpus is None:
            raise ValueError("name what to train on: a [data] section to prepare it from, or loader.corpus, a finished corpus")
        self.parallel.check_batch(self.loader.global_batch)
        self.parallel.check_model(self.model, self.loader.sequence_length, self.loader.global_batch)
        self._shorter_lengths_fit()
        self._grown_shapes_fit()
        steps = [event.at_step for event in self.growth if event.at_step is not None]
        if steps != sorted(set(steps)):
            raise ValueError(f"growth: at_step = {steps}: events stand in ascending order, at most one a step")
        if steps and steps[-1] >= self.run.steps:
            raise ValueError(f"growth: at_step = {steps[-1]} is not before the end of the run (run.steps = {self.run.steps})")
        if self.run.attention == "varlen" and self.parallel.cp > 1:
            raise ValueError('run.attention = "varlen" needs whole documents on a rank, parallel.cp > 1 deals them out; use "auto"')
        if self.precision.products == "hardware" and self.run.dtype != "bfloat16":
            raise ValueError(
                'precision.products = "hardware": matrix units give sums of eight-bit products in half precision; set run.dtype = "bfloat16"'
            )
        if self.run.attention == "varlen" and self.run.device == "cuda" and self.run.dtype == "float32":
            raise ValueError('run.attention = "varlen" has a kernel for half precision only; set run.dtype = "bfloat16"')
        if self.supervision.elastic and (changing := [event.at for event in self.growth if event.parallel]):
            raise ValueError(f"supervision.elastic: the growth at {changing[0]} changes the parallel plan; have one of the two")
        if self.data and not self.loader.corpus:
            tokenizer = self.data.tokenizer
            if tokenizer.path is None and tokenizer.vocabulary > self.model.vocabulary:
                raise ValueError(
                    f"model.vocabulary = {self.model.vocabulary} is smaller than data.tokenizer.vocabulary = {tokenizer.vocabulary}; "
                    f"set model.vocabulary to at least {tokenizer.vocabulary}"
                )
        return self

    def _shorter_lengths_fit(self) -> None:
        """The plan must fit every length that sequences will have."""
        for stage in self.loader.length_schedule:
            if self.parallel.pp > 1:
                raise ValueError("loader.length_schedule: the stages of a pipeline exchange messages of one shape; set parallel.pp = 1")
            try:
                self.parallel.check_model(self.model, stage.sequence_length, self.loader.global_batch)
            except ValueError as error:
                raise ValueError(f"loader.length_schedule at step {stage.at_step}: {error}") from error

    def _grown_shapes_fit(self) -> None:
        """The plan and the precision recipe must fit every shape that the model will have."""
        model, plan, loader = self.model, self.parallel, self.loader
        self._precision_fits(model, plan)
        for event in self.growth:
            try:
                model, plan = event.configs(model)[-1], event.plan_after(plan)
                plan.check_batch(loader.global_batch)
                for length in {loader.sequence_length, *(stage.sequence_length for stage in loader.length_schedule)}:
                    plan.check_model(model, length, loader.global_batch)
                self._precision_fits(model, plan)
                if plan.pp > 1 and loader.length_schedule:
                    raise ValueError("loader.length_schedule: the stages of a pipeline exchange messages of one shape; set pp = 1")
                if plan.engine != "native" and event.operators[-1].op == "random_pad":
                    raise ValueError(f'random_pad fades its values in during training, which parallel.engine = "{plan.engine}" does not')
            except (ValueError, UserError) as error:
                raise ValueError(f"after the growth at {event.at}: {error}") from error

    def _precision_fits(self, model: ModelConfig, plan: ParallelPlan) -> None:
        lengths = [self.loader.sequence_length, *(stage.sequence_length for stage in self.loader.length_schedule)]
        check_fits(self.precision.build(), model, plan, lengths)


def load_config(name: str, overrides: list[str] | None = None) -> RunConfig:
    """A run's config by path or recipe name, with dotted overrides."""
    return load(RunConfig, find_recipe(name), overrides)
