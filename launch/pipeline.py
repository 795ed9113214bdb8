"""A chain of commands from documents to an evaluated model: its stages, what each was made from, and which have to be made again.

A stage's folder is `folder/NAME`; a training stage's run is reached as `folder/NAME/run`. What a stage was made from is in `folder/.stages/NAME.json`.
"""

import re
import secrets
import shlex
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from regrowth.errors import UserError, nearest
from regrowth.files import fingerprint, read_json, sha256_of, write_json, write_text
from regrowth.launch.pipeline_config import PipelineConfig, Stage, StageSlurm
from regrowth.launch.place import ALIVE, held, state_of
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import find_recipe, load, validate

_PLACE = re.compile(r"\{([^{}.]+)(\.run)?\}")
_HASHED = 16 << 20  # bytes of a file above which its size and date stand for its content
State = Literal["finished", "waiting", "stale", "queued", "running", "stopped", "failed", "lost"]
BUSY: tuple[State, ...] = ("queued", "running")


@dataclass
class Record:
    """What a stage was begun with, and how it ended; `id` is new whenever it is made afresh. Without `parts` it was submitted and has not begun."""

    parts: dict[str, str] = field(default_factory=dict)  # what it is made from: its command, files by path, other stages by name
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    began: float = field(default_factory=time.time)
    ended: float | None = None
    exit_code: int | None = None


class Pipeline:
    """The stages of a file, in the order in which they can be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = load(PipelineConfig, path)
        self.folder = self.config.folder
        self.stages = {stage.name: stage for stage in self.config.stages}
        if len(self.stages) < len(self.config.stages):
            names = [stage.name for stage in self.config.stages]
            raise UserError(f"{path}: stages: two have the name {next(n for n in names if names.count(n) > 1)}.")
        self.slurm = {stage.name: self._slurm(number, stage) for number, stage in enumerate(self.config.stages)}
        self.order = self._ordered()

    def _slurm(self, number: int, stage: Stage) -> StageSlurm:
        return validate(
            StageSlurm, {**self.config.slurm.model_dump(exclude_unset=True), **stage.slurm}, f"{self.path}: stages.{number}.slurm"
        )

    @cached_property
    def needs(self) -> dict[str, list[str]]:
        """The stages that each one needs.

        Raises:
            UserError: one is named that does not exist, or the run of one that does not train.
        """
        found: dict[str, list[str]] = {}
        for stage in self.config.stages:
            named = dict.fromkeys(stage.after)
            for name, run in _PLACE.findall(stage.run or stage.shell or ""):
                if name == "out":
                    continue
                named[name] = None
                if run and name in self.stages and not self.stages[name].trains:
                    raise UserError(
                        f"{self.path}: stage {stage.name}: {{{name}.run}}: stage {name} trains nothing; its folder is {{{name}}}."
                    )
            if unknown := [name for name in named if name not in self.stages]:
                raise UserError(
                    f"{self.path}: stage {stage.name}: there is no stage {unknown[0]}; {nearest(unknown[0], list(self.stages))}"
                )
            found[stage.name] = list(named)
        return found

    def _ordered(self) -> list[str]:
        order: list[str] = []
        while len(order) < len(self.stages):
            ready = [name for name in self.stages if name not in order and all(n in order for n in self.needs[name])]
            if not ready:
                left = [name for name in self.stages if name not in order]
                raise UserError(f"{self.path}: stages {', '.join(left)} wait for each other; no one of them can be first.")
            order.append(ready[0])
        return order

    def below(self, name: str) -> list[str]:
        """A stage and all that need it, in order."""
        found = [name]
        for other in self.order:
            if other not in found and any(need in found for need in self.needs[other]):
                found.append(other)
        return found

    def out(self, name: str) -> Path:
        """A stage's folder."""
        return self.folder / name

    def command(self, name: str) -> list[str]:
        """A stage's words with its places filled in; of the shell, one word."""
        stage = self.stages[name]

        def place(found: re.Match[str]) -> str:
            path = self.out(name if found[1] == "out" else found[1]).resolve()
            return str(path / "run" if found[2] else path)

        if stage.shell is not None:
            return [_PLACE.sub(lambda found: shlex.quote(place(found)), stage.shell)]
        return [_PLACE.sub(place, word) for word in shlex.split(stage.run or "")] + (
            [f"run.folder={self.out(name).resolve()}"] if stage.trains else []
        )

    def parts(self, name: str) -> dict[str, str]:
        """What a stage is made from now."""
        stage, command = self.stages[name], self.command(name)
        files = [Path(word.rpartition("=")[2]) for word in command] if stage.run else []
        recipe = command[1:2] if command[0] == "train" else command[2:3] if command[:2] in (["data", "run"], ["data", "prepare"]) else []
        recipes = [find_recipe(word) for word in recipe if not word.startswith("-")]
        found = {"command": stage.run or stage.shell or ""}
        found |= {str(path): _signature(path) for path in [*recipes, *files] if _is_file(path) and not self._inside(path)}
        found |= {str(path): _signature(path) for path in stage.uses}
        for other in self.needs[name]:
            record = self.record(other)
            found[f"stage {other}"] = record.id if record else ""
        return found

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self.folder.resolve())

    def record(self, name: str) -> Record | None:
        """What a stage was begun with, if it was."""
        path = self._record_path(name)
        try:
            return Record(**read_json(path)) if path.exists() else None
        except TypeError:  # of another version
            return None

    def note(self, name: str, record: Record) -> None:
        """Keep a stage's record."""
        write_json(self._record_path(name), asdict(record))

    def forget(self, name: str) -> None:
        """A stage is to be made afresh."""
        self._record_path(name).unlink(missing_ok=True)

    def job(self, name: str) -> str:
        """The Slurm job that was submitted last for a stage; empty if none was."""
        path = self.folder / ".stages" / f"{name}.job"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def note_job(self, name: str, job: str) -> None:
        """Keep a stage's job: apart from its record, which the job itself may be writing by now."""
        write_text(self.folder / ".stages" / f"{name}.job", job)

    def lock_of(self, name: str) -> Path:
        """What who makes a stage holds meanwhile."""
        return self.folder / ".stages" / f"{name}.lock"

    def _record_path(self, name: str) -> Path:
        return self.folder / ".stages" / f"{name}.json"

    def run_of(self, name: str) -> RunFolder | None:
        """The newest run of a training stage."""
        runs = [path.parent for path in self.out(name).glob("*_*/config.toml")]
        return RunFolder(max(runs, key=lambda path: (path / "config.toml").stat().st_mtime)) if runs else None

    def states(self, queue: dict[str, dict[str, int]]) -> dict[str, tuple[State, str]]:
        """How each stage is, in order, and a word on it.

        Args:
            queue: what Slurm says of its jobs (`launch.slurm.queued`).
        """
        found: dict[str, tuple[State, str]] = {}
        for name in self.order:
            state, told = self._state(name, queue)
            again = [need for need in self.needs[name] if found[need][0] != "finished"]
            found[name] = ("stale", f"stage {again[0]} comes first") if again and state == "finished" else (state, told)
        return found

    def _state(self, name: str, queue: dict[str, dict[str, int]]) -> tuple[State, str]:
        record = self.record(name)
        if (job := self.job(name)) and (told := ", ".join(queue.get(job, {}))):
            return ("running" if told.startswith(("running", "completing")) else "queued"), f"Slurm job {job}, {told}"
        if held(self.lock_of(name)):
            return "running", "on this machine"
        if record is None or not record.parts:
            return "waiting", ""
        if changed := self._changed(record.parts, self.parts(name)):
            return "stale", changed
        return self._ended(name, record, queue)

    def _ended(self, name: str, record: Record, queue: dict[str, dict[str, int]]) -> tuple[State, str]:
        if record.exit_code == 0:
            return "finished", ""
        run = self.run_of(name) if self.stages[name].trains else None
        if run and run.finished:
            return "finished", ""
        if run and record.exit_code is None:
            state, told = state_of(run, queue)
            return ("running" if state in ALIVE else "lost" if state in ("lost", "finished") else state), told
        if record.exit_code is None:
            return "lost", "it neither runs nor said how it ended"
        return ("stopped" if record.exit_code == 75 else "failed"), f"exit code {record.exit_code}"

    @staticmethod
    def _changed(before: dict[str, str], now: dict[str, str]) -> str:
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                if key == "command":
                    return "its command has changed"
                return f"{key} has been made again" if key.startswith("stage ") else f"{key} has changed"
        return ""


def _is_file(path: Path) -> bool:
    """Whether a word of a command is a file's name; one that no name can be as long as is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _signature(path: Path) -> str:
    """What tells whether a file, or anything in a folder, has changed: contents of small files, sizes and dates of large ones and of folders."""
    if not path.exists():
        return "missing"
    if path.is_file():
        size = path.stat().st_size
        return sha256_of(path) if size <= _HASHED else f"{size} {path.stat().st_mtime_ns}"
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return fingerprint([(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
