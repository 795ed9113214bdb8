"""The folder of a run, which explains itself.

runs/2026-11-21_quickstart/
  config.toml        resolved; the command line and versions in its head     environment.json, code.patch  code, versions, devices
  metrics.jsonl      one row a step                                           evaluations.jsonl
  mixing.jsonl       every draw and what the policy learned from it           events.jsonl  growth, precision, restarts, skipped steps
  precision.jsonl    errors of rounding, where the recipe measures them
  checkpoints/       logs/rank-0.log ...      export/hf/      report.html
"""

import errno
import json
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from regrowth import __version__
from regrowth.data_pipeline.mixing.decisions import is_decision
from regrowth.errors import UserError
from regrowth.files import append_jsonl, atomic_path, iterate_jsonl, make_folder, read_jsonl, sync_entry, write_text
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.checkpoint_folders import list_checkpoints, step_of
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.growth.event import plan_in_force
from regrowth.pretrain.lineage import read_lineage
from regrowth.pretrain.snapshot import write_snapshot
from regrowth.settings import load, to_toml

LOGS = ("metrics", "evaluations", "mixing", "events")


class RunFolder:
    """Paths and logs of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: RunConfig) -> "RunFolder":
        """A new folder for a run, named by day and name; a second run of the same name on a day gets a number.

        Raises:
            UserError: the folder cannot be made.
        """
        base = config.run.folder / f"{time.strftime('%Y-%m-%d')}_{config.run.name}"
        try:
            make_folder(base.parent)
            path = _new_folder(base)
        except OSError as error:
            raise UserError(f"run.folder = {config.run.folder}: cannot make a run folder there ({error.strerror}).") from error
        head = f"# {shlex.join(sys.argv)}\n# regrowth {__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n\n"
        write_text(path / "config.toml", head + to_toml(config))
        write_snapshot(path)
        return cls(path)

    @staticmethod
    def check_place(config: RunConfig) -> None:
        """Whether a run's folder can be made where the config wants it: asked before the data is prepared, which may take hours.

        Raises:
            UserError: it cannot.
        """
        place = config.run.folder.resolve()
        while not place.exists():
            place = place.parent
        fault = (
            errno.ENOTDIR if not place.is_dir() else 0 if os.access(place, os.W_OK) else errno.EROFS if _read_only(place) else errno.EACCES
        )
        if fault:
            raise UserError(f"run.folder = {config.run.folder}: cannot make a run folder there ({os.strerror(fault)}).")

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            UserError: it is not a run's folder.
        """
        if not (path / "config.toml").exists():
            raise UserError(f"{path}: not a run's folder (no config.toml in it). Name another, or start it anew: regrowth train CONFIG")
        return cls(path)

    def config(self, overrides: list[str] | None = None) -> RunConfig:
        """The run's resolved config."""
        return load(RunConfig, self.path / "config.toml", overrides)

    def log(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to one of the run's logs."""
        append_jsonl(self.path / f"{name}.jsonl", row)

    def logs(self) -> list[Path]:
        """The files of the run's logs that there are."""
        return sorted(self.path.glob("*.jsonl"))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of the run's logs."""
        return read_jsonl(self.path / f"{name}.jsonl")

    def decisions(self) -> list[dict[str, Any]]:
        """The steps of the decision log, without the rows that say what they are decided by."""
        return [row for row in self.rows("mixing") if is_decision(row)]

    def decided_by(self) -> dict[str, Any]:
        """The last row of the decision log that says what decisions are made by; empty if there is none."""
        last: dict[str, Any] = {}
        for row in iterate_jsonl(self.path / "mixing.jsonl"):
            if not is_decision(row) and row["step"] >= last.get("step", 0):  # of several before one step the last one holds
                last = row
        return last

    def rewind(self, step: int) -> None:
        """Forget the rows of steps that will be done again; events are history and stay."""
        for name in ("metrics", "mixing", "evaluations", "precision"):
            path = self.path / f"{name}.jsonl"
            if not path.exists():
                continue
            with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as out:
                for row in iterate_jsonl(path):  # not all at once: the logs of a long run are large
                    # What stands in front of a step stays: its evaluation, and what its decisions are made by.
                    if row["step"] < step + (name == "evaluations" or (name == "mixing" and not is_decision(row))):
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")

    def plan(self, config: RunConfig | None = None) -> ParallelPlan:
        """The parallel plan on which the run goes on, which growths may have changed: as its newest checkpoint's lineage tells."""
        config = config or self.config()
        newest = self.newest_checkpoint
        if not config.growth or newest is None:
            return config.parallel
        return plan_in_force(config.parallel, config.growth, read_lineage(newest))

    @property
    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that was finished; what its files hold is not looked at."""
        return next((path for path in reversed(list_checkpoints(self.path)) if (path / "manifest.json").exists()), None)

    @property
    def checkpointed(self) -> int:
        """The step of the newest checkpoint, -1 without one."""
        return step_of(newest) if (newest := self.newest_checkpoint) else -1

    def ended_by(self, *names: str) -> bool:
        """Whether the last thing that happened to the run is one of these events."""
        return any(row["event"] in names for row in self.rows("events")[-1:])

    @property
    def replanned(self) -> bool:
        """Whether the run waits for a launcher to start the ranks that it needs after a growth."""
        return self.ended_by("replanned")

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step; one whose `run.steps` was raised since is not finished any more."""
        last = max((row["step"] for row in self.rows("events") if row["event"] == "finished"), default=-1)
        return last >= 0 and last >= self.config().run.steps


def _read_only(place: Path) -> bool:
    return bool(os.statvfs(place).f_flag & os.ST_RDONLY)


def _new_folder(base: Path) -> Path:
    number, path = 1, base
    while True:
        try:
            path.mkdir(mode=0o700)  # its owner's alone: text and paths are in the logs
            sync_entry(path)
            return path
        except FileExistsError:
            number += 1
            path = base.with_name(f"{base.name}_{number}")


def unfinished_run(config: RunConfig) -> RunFolder | None:
    """The newest run of this very config that has no report yet: stopped before its end, or before it was exported and reported."""
    named = re.compile(rf"\d{{4}}-\d\d-\d\d_{re.escape(config.run.name)}(_\d+)?$")
    candidates = [p.parent for p in config.run.folder.glob("*/data.json") if named.match(p.parent.name)]
    for path in sorted(candidates, key=lambda p: p.stat().st_mtime, reverse=True):
        run = RunFolder(path)
        try:
            if run.config() == config and not (path / "report.html").exists():
                return run
        except UserError:  # of another version
            continue
    return None
