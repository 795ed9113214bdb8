"""Runs as one sees them from another shell: status, logs, cancel, resume; of this machine, and of a real Slurm."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from regrowth.errors import UserError
from regrowth.launch.logs import MergedLogs
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from tests.conftest import small_run_values
from tests.faults.helpers import struck_by
from tests.launch.helpers import call, one_letter, only_run, start, steps_done, wait_for, write_config
from tests.slurm_cluster import SlurmCluster

TWO = {"parallel": {"dp_shard": 2, "micro_batch": 2}, "checkpoint": {"every": 5, "keep": 3}}


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: Path) -> dict[str, Any]:
    """What `launch status --json` says of one run."""
    code, output = call(capsys, monkeypatch, "launch", "status", run, "--json")
    assert code == 0, output
    (row,) = json.loads(output)
    return row


def test_a_run_is_watched_cancelled_and_taken_up_from_another_shell(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, **TWO)
    launcher = start("train", config)
    try:
        wait_for(lambda: steps_done(tmp_path) > 6, launcher)
        run = only_run(tmp_path)
        row = told(capsys, monkeypatch, run.path)
        assert row["state"] == "running" and row["step"] > 6 and row["starts"] == 1 and row["last_sign_seconds"] < 60
        assert row["place"]["pid"] == launcher.pid
        code, output = call(capsys, monkeypatch, "launch", "status", tmp_path / "runs")
        assert code == 0 and "running" in output and run.path.name in output

        for again in (["train", "--resume", run.path], ["launch", "resume", run.path]):
            code, output = call(capsys, monkeypatch, *again)
            assert code == 2 and ("another process is running this run" in output or "running already" in output)

        code, output = call(capsys, monkeypatch, "launch", "cancel", run.path)
        assert code == 0 and "regrowth launch resume" in output and "step-" in output, output
        output = launcher.communicate(timeout=60)[0]
        assert launcher.returncode == 75, output
    finally:
        launcher.kill()
    row = told(capsys, monkeypatch, run.path)
    assert row["state"] == "stopped" and row["checkpoint"] == row["step"]
    code, output = call(capsys, monkeypatch, "launch", "cancel", run.path)
    assert code == 2 and "not running here (stopped" in output
    code, output = call(capsys, monkeypatch, "launch", "resume", run.path, f"run.steps={row['step'] + 2}")
    assert code == 0, output
    row = told(capsys, monkeypatch, run.path)
    assert row["state"] == "finished" and row["starts"] == 2 and row["failures"] == 0


@pytest.mark.slow
def test_logs_of_all_ranks_are_one_with_the_first_error_on_top(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks fail; what the second says of it is only an echo."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 8}, supervision={"restarts": 0}, **TWO)
    fault = {"what": "exception", "who": "1", "phase": "update", "step": 3, "marker": str(tmp_path / "struck")}
    launcher = start("train", config, env=struck_by(fault=fault))
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1 and "a fault put there by a test" in one_letter(output)
    run = only_run(tmp_path)
    code, output = call(capsys, monkeypatch, "launch", "logs", run.path)
    lines = output.splitlines()
    assert code == 0 and lines[0].startswith("first error of the last start: rank 1, ") and "a fault put there by a test" in lines[0]
    assert any("rank 1 " in line and "Traceback" in line for line in lines) and any(
        "run " in line and "started: " in line for line in lines
    )
    merged = MergedLogs(run, []).new_lines()
    assert [line.time for line in merged] == sorted(line.time for line in merged) and {line.who for line in merged} == {
        "rank 0",
        "rank 1",
        "run",
    }
    code, output = call(capsys, monkeypatch, "launch", "logs", run.path, "--rank", "1", "-n", "3")
    assert "rank 0 " not in output and len(output.splitlines()) == 4
    code, output = call(capsys, monkeypatch, "launch", "logs", run.path, "--rank", "7")
    assert code == 2 and "no log of rank 7; there are those of 0-1" in output
    assert told(capsys, monkeypatch, run.path)["state"] == "failed"


def test_lines_of_native_code_have_the_time_of_those_before_them(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for rank, text in (
        (0, "2026-11-21T10:00:02.500+0000 second\nnative\n"),
        (1, "2026-11-21T10:00:01.000+0000 first\n2026-11-21T10:00:03.000+0000 third\nhalf"),
    ):
        (tmp_path / f"logs/rank-{rank}.log").write_text(text)
    merged = MergedLogs(RunFolder(tmp_path), [])
    assert [line.text for line in merged.new_lines()] == ["first", "second", "native", "third"]
    with (tmp_path / "logs/rank-1.log").open("a") as log:
        log.write(" a line\n")
    assert [line.text for line in merged.new_lines()] == ["half a line"]


@pytest.mark.slow
def test_a_slurm_job_is_cancelled_with_a_checkpoint_and_taken_up_with_its_options(
    cluster: SlurmCluster, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, **TWO)
    setup = "export REGROWTH_RENDEZVOUS=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"
    code, output = call(
        capsys, monkeypatch, "launch", "slurm", config, "--nodes", "2", "--partition", "ci", "--minutes", "7", "--setup", setup
    )
    assert code == 0, output
    job = output.split()[-1]
    wait_for(lambda: steps_done(tmp_path) > 6, seconds=120)
    run = only_run(tmp_path)
    row = told(capsys, monkeypatch, run.path)
    assert row["state"] == "running" and row["place"]["job"] == job
    code, output = call(capsys, monkeypatch, "launch", "cancel", run.path)
    assert code == 0 and "regrowth launch resume" in output, output
    row = told(capsys, monkeypatch, run.path)
    assert row["state"] == "stopped" and row["checkpoint"] == row["step"] > 6
    assert not any(event["event"] in ("requeued", "failed") for event in run.rows("events"))
    assert any(line.who == "rank 1" for line in MergedLogs(run, []).new_lines()), "ranks of other nodes have logs in the run's folder too"
    code, output = call(capsys, monkeypatch, "launch", "resume", run.path, f"run.steps={row['step'] + 5}")
    assert code == 0, output
    again = output.split()[-1]
    asked = subprocess.run(["scontrol", "show", "job", again], capture_output=True, text=True, timeout=20).stdout
    assert "NumNodes=2" in asked and "Partition=ci" in asked and "TimeLimit=00:07:00" in asked, asked
    wait_for(lambda: run.finished, seconds=150)
    wait_for(lambda: told(capsys, monkeypatch, run.path)["state"] == "finished", seconds=60)


def test_a_folder_in_which_no_run_can_be_made_is_named(documents: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    config = RunConfig.model_validate(small_run_values(documents, tmp_path / "prepared", tmp_path / "runs"))
    with pytest.raises(UserError, match=r"run.folder = .*: cannot make a run folder there \(File exists\)"):
        RunFolder.create(config)


def test_a_run_on_a_read_only_disk_is_refused_before_its_data_is_prepared(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a read-only disk needs root")
    try:
        config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"folder": str(disk / "runs")})
        code, output = call(capsys, monkeypatch, "train", config)
        assert code == 2 and "run.folder" in one_letter(output) and "Read-only file system" in output
        assert not (tmp_path / "prepared").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
