"""What a `pipeline.toml` holds: the stages of a chain of commands, and what their jobs ask Slurm for."""

import re
import shlex
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from regrowth.settings import PlainName, Settings


class StageSlurm(Settings):
    """What a stage's job asks Slurm for; `nodes`, `spares` and `ranks_per_node` count for training alone, `cpus` for the other stages."""

    cluster: str | None = None  # a described machine, as of `launch slurm --cluster`
    partition: str | None = None
    account: str | None = None
    minutes: int = Field(60, ge=1)
    nodes: int = Field(1, ge=1)
    ranks_per_node: int | None = Field(None, ge=1)
    spares: int = Field(0, ge=0)
    gpus_per_node: int = Field(0, ge=0)
    cpus: int = Field(2, ge=1)
    setup: list[str] = []


class Stage(Settings):
    """One step of a chain: a command of ours (`run`) or of the shell (`shell`).

    In both `{out}` is the stage's folder, `{NAME}` another stage's, `{NAME.run}` the run in it. What is named has to be made before; `after` adds to that.
    `uses` are files and folders from outside: when they change, the stage has to be made again.
    """

    name: PlainName
    run: str | None = None
    shell: str | None = None
    after: list[str] = []
    uses: list[Path] = []
    slurm: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _is_a_word(cls, name: str) -> str:
        if name == "out" or not re.fullmatch(r"[\w-]+", name):
            raise ValueError('letters, digits, "_" and "-", and not "out", which is every stage\'s own folder')
        return name

    @model_validator(mode="after")
    def _one_command(self) -> "Stage":
        if (self.run is None) == (self.shell is None):
            raise ValueError("give run (a regrowth command, without the word regrowth) or shell, one of them")
        try:
            words = shlex.split(self.run or self.shell or "")
        except ValueError as error:
            raise ValueError(f"not a command line: {error}") from error
        if not words:
            raise ValueError("the command is empty")
        if self.run and words[0] == "train" and (len(words) < 2 or words[1].startswith("-")):
            raise ValueError("train: name the config first; a stage that was stopped is resumed without being told to")
        return self

    @property
    def trains(self) -> bool:
        """Whether it is a run of ours, which goes on from its checkpoints."""
        return self.run is not None and shlex.split(self.run)[0] == "train"


class PipelineConfig(Settings):
    """A `pipeline.toml`. `slurm` holds for all stages, a stage's own table before it."""

    name: PlainName
    folder: Path
    stages: list[Stage] = Field(min_length=1)
    slurm: StageSlurm = Field(default_factory=lambda: StageSlurm.model_validate({}))
