"""The command line: in a process of its own, as users run it, or in this one."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from regrowth.launch.main import main
from regrowth.launch.slurm import JobOptions, render, submit
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import to_toml
from tests.conftest import small_run_values


def write_config(path: Path, documents: Path, folder: Path, **sections: Any) -> Path:
    """A small run's config as a file; data and runs go below `folder`."""
    values = small_run_values(documents, folder / "prepared", folder / "runs", **sections)
    path.write_text(to_toml(RunConfig.model_validate(values)))
    return path


def regrowth(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command and wait."""
    return subprocess.run([sys.executable, "-m", "regrowth", *map(str, arguments)], capture_output=True, text=True, timeout=240, **options)


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> tuple[int, str]:
    """(exit code, output) of the command in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", ["regrowth", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start the command."""
    return subprocess.Popen(
        [sys.executable, "-m", "regrowth", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def only_run(folder: Path) -> RunFolder:
    """The one run below `folder`."""
    (path,) = (folder / "runs").glob("*_*/")
    return RunFolder(path)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 90.0) -> None:
    """Wait until something is true, or fail loudly."""
    until = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} too early: {process.stdout.read() if process.stdout else ''}")
        if time.monotonic() > until:
            raise AssertionError("it did not happen in time")
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    """Steps in the log of the run below `folder`, 0 before it exists."""
    runs = list((folder / "runs").glob("*_*/metrics.jsonl"))
    return sum(1 for _ in runs[0].open()) if runs else 0


def soon_after_a_checkpoint(folder: Path, least: int = 10, most_after: int = 3) -> bool:
    """Whether the run below `folder` has a whole checkpoint of step `least` or later, and at most `most_after` steps since."""
    if steps_done(folder) < least:
        return False
    run = only_run(folder)
    return run.checkpointed >= least and steps_done(folder) - run.checkpointed <= most_after


def submitted(config: Path | str, minutes: int, **more: Any) -> tuple[str, Path]:
    """(the number of a job of two nodes, where its logs are)."""
    setup = ["export REGROWTH_RENDEZVOUS=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]
    text, logs = render(str(config), [], JobOptions(nodes=2, partition="ci", minutes=minutes, setup=setup, **more))
    logs.mkdir(parents=True, exist_ok=True)
    return submit(text).split()[-1], logs


def happened(folder: Path, event: str) -> list[dict[str, Any]]:
    """The events of a kind of the one run, which may not be there yet."""
    return [e for e in only_run(folder).rows("events") if e["event"] == event] if list((folder / "runs").glob("*_*/events.jsonl")) else []


def ranks_on_this_host(run: RunFolder) -> list[int]:
    """The processes that write the logs of a run."""
    beats = {str(path.resolve()) for path in (run.path / "logs").glob("rank-*.beat")}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [int(process.name) for fd in (process / "fd").iterdir() if str(fd.readlink()) in beats]
    return found


def one_letter(output: str) -> str:
    """The output holds exactly one message of ours and no traceback; returns it."""
    assert "Traceback" not in output, output
    letters = [line for line in output.splitlines() if line.startswith(("error: ", "failed: ", "stopped: "))]
    assert len(letters) == 1, output
    return letters[0]
