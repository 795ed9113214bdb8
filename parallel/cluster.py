"""Descriptions of machines (`configs/clusters/*.toml`): what the planner reckons with, and what Slurm is asked for there."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from regrowth.settings import Settings, load, recipe_folder

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class SlurmDefaults(Settings):
    """What `launch slurm --cluster` asks for where its options do not say, and the most that may be asked for."""

    partition: str | None = None
    account: str | None = None
    minutes: Count | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None  # that a node has
    setup: list[str] = []  # shell lines that run first
    max_minutes: Count | None = None
    max_nodes: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> "SlurmDefaults":
        if self.minutes and self.max_minutes and self.minutes > self.max_minutes:
            raise ValueError(
                f"slurm.minutes = {self.minutes} is more than slurm.max_minutes = {self.max_minutes}; lower the one or raise the other."
            )
        return self


class Speed(Settings):
    """Times the rate of the training dtype at which linears run whose operands are of a format. Only what kernels really reach belongs here."""

    e2m1: Positive = 1.0
    e4m3: Positive = 1.0
    e5m2: Positive = 1.0


class Cluster(Settings):
    """A machine."""

    name: str
    device: str
    devices_per_node: Count
    memory_gib: Positive  # of one device
    sustained_tflops: Positive  # of one device in the training dtype, as large matrix products reach it
    efficiency: Annotated[float, Field(gt=0, le=1)]  # share of that which a training step reaches
    link_gbytes_per_second: Positive  # within a node, each way, per device
    network_gbytes_per_second: Positive  # between nodes, each way, per device
    speed: Speed | None = None  # None: narrow formats are no faster
    slurm: SlurmDefaults = SlurmDefaults()


def clusters() -> dict[str, Path]:
    """The described machines that ship with the package, by name."""
    return {path.stem: path for path in sorted((recipe_folder() / "clusters").glob("*.toml"))}


def load_cluster(path: Path) -> Cluster:
    """A machine's description.

    Raises:
        UserError: naming file, key, value and what is allowed.
    """
    return load(Cluster, path)
