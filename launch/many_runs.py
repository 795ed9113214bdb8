"""Many small runs: each in a process of its own, gone on with where it was stopped, some at a time."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from regrowth.errors import RunFailed, UserError
from regrowth.files import write_text
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import to_toml

T = TypeVar("T")


def find_run(config: RunConfig) -> RunFolder | None:
    """The run of this very config, finished or not; those of another config are not looked at."""
    for path in sorted(config.run.folder.glob(f"*_{config.run.name}*"), reverse=True):
        run = RunFolder(path)
        try:
            if (path / "data.json").exists() and run.config() == config:
                return run
        except UserError:  # of another version
            continue
    return None


def train_all(
    configs: Sequence[RunConfig], at_once: int, what: str, console: Console, then: Callable[[int, RunFolder], T]
) -> Iterator[tuple[int, T]]:
    """Train what is missing of these runs, begun in this order.

    Args:
        then: called with a config's place and its finished run, by the thread that waited for it: no more than `at_once` of either are under way.

    Yields:
        (place, what `then` gave), of each run as it ends.

    Raises:
        RunFailed: a run did not reach its end; the others are trained before it is told.
    """

    def one(place: int) -> T:
        if not ((run := find_run(configs[place])) and run.finished):
            _train(configs[place])
        run = find_run(configs[place])
        assert run is not None
        return then(place, run)

    failed: list[BaseException] = []
    with ThreadPoolExecutor(at_once) as pool:
        begun = {pool.submit(one, place): place for place in range(len(configs))}
        try:
            for run in track(
                as_completed(begun), f"{what}: {len(begun)} runs", len(begun), console=console, disable=not console.is_terminal
            ):
                if error := run.exception():
                    failed.append(error)
                else:
                    yield begun[run], run.result()
        except BaseException:  # those that are running are stopped by the same Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise failed[0]


def _train(config: RunConfig) -> None:
    folder, name = config.run.folder.parent / "logs", config.run.name
    write_text(folder / f"{name}.toml", to_toml(config))
    begun = find_run(config)
    command = ["--resume", str(begun.path)] if begun else [str(folder / f"{name}.toml")]
    log = folder / f"{name}.log"
    with log.open("a") as out:
        code = subprocess.run(
            [sys.executable, "-m", "regrowth", "train", *command], stdout=out, stderr=out, stdin=subprocess.DEVNULL
        ).returncode
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise RunFailed(
            f"the run {name} ended with exit code {code} ({' '.join(last)[-600:]}); its log is {log}. The same command goes on with it."
        )


def checkpoint_at(run: RunFolder, step: int | None) -> Path:
    """A run's checkpoint of a step, or its last.

    Raises:
        UserError: there is none.
    """
    from regrowth.pretrain.checkpoint_folders import list_checkpoints, step_of

    found = [path for path in list_checkpoints(run.path) if step is None or step_of(path) == step]
    if not found:
        raise UserError(f"{run.path}: has no checkpoint{'' if step is None else f' of step {step}'}.")
    return found[-1]
