"""Real processes that are really killed: each fault gives one clear message, and nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from regrowth.launch.stacks import py_spy
from tests.launch.helpers import one_letter, only_run, regrowth, soon_after_a_checkpoint, start, steps_done, wait_for, write_config
from tests.pretrain.helpers import losses

TWO = {"parallel": {"dp_shard": 2, "micro_batch": 2}, "checkpoint": {"every": 5, "keep": 3}}


@pytest.fixture(scope="module")
def undisturbed(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "c.toml", documents, folder, run={"steps": 60}, **TWO)
    assert regrowth("train", config).returncode == 0
    return losses(only_run(folder))


def workers(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """rank -> pid of the launcher's workers."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == launcher.pid:
                environment = dict(e.split("=", 1) for e in (entry / "environ").read_text().split("\0") if "=" in e)
                found[int(environment["RANK"])] = int(entry.name)
        except (OSError, KeyError, ValueError, IndexError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_after_kill_nine_of_a_worker_the_run_goes_on_by_itself_bit_for_bit(
    rank: int, undisturbed: list[float], documents: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 60}, **TWO)
    launcher = start("train", config)
    wait_for(lambda: soon_after_a_checkpoint(tmp_path), launcher)
    os.kill(workers(launcher)[rank], signal.SIGKILL)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0 and "Starting again" in output and "Traceback" not in output, output
    run = only_run(tmp_path)
    assert losses(run) == undisturbed
    (failed,) = [e for e in run.rows("events") if e["event"] == "failed"]
    assert f"rank {rank} was killed" in failed["reason"] and failed["lost_steps"] <= 5 + 1
    assert any(e["event"] == "resumed" and e["step"] >= 10 for e in run.rows("events"))


def test_a_run_that_is_lost_again_and_again_is_given_up(documents: Path, tmp_path: Path) -> None:
    supervision = {
        "restarts": 1,
        "backoff_seconds": 0.1,
        "on_failure": f'echo "$REGROWTH_MESSAGE" > {tmp_path}/told; echo no paper >&2; exit 3',
    }
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, parallel={"micro_batch": 4},
                          checkpoint={"every": 100_000}, supervision=supervision)  # fmt: skip
    launcher = start("train", config)
    wait_for(lambda: steps_done(tmp_path) > 3, launcher)
    first = workers(launcher)[0]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: workers(launcher).get(0, first) != first, launcher)
    os.kill(workers(launcher)[0], signal.SIGKILL)
    output = launcher.communicate(timeout=60)[0]
    letter = one_letter(output)
    assert launcher.returncode == 1 and "rank 0 was killed" in letter and "2 times in a row" in letter
    run = only_run(tmp_path)
    assert [e["event"] for e in run.rows("events")].count("failed") == 2
    assert "rank 0 was killed" in (tmp_path / "told").read_text()
    assert "exit code 3: no paper" in output


def test_ranks_that_hang_are_found_and_started_again(undisturbed: list[float], documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 60}, supervision={"hang_seconds": 4.0}, **TWO)
    launcher = start("train", config)
    wait_for(lambda: steps_done(tmp_path) > 12, launcher)
    os.kill(workers(launcher)[1], signal.SIGSTOP)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0, output
    run = only_run(tmp_path)
    assert losses(run) == undisturbed
    (failed,) = [e for e in run.rows("events") if e["event"] == "failed"]
    assert "hung: no rank did anything for" in failed["reason"] and "rank 1 is in state T (stopped)" in failed["reason"]
    log = (run.path / "logs/rank-0.log").read_text()
    stacks = log.partition("-- found hanging")[0]
    assert " in train_step" in stacks and "wchan: " in log, "where rank 0 waited: in the exchange of counts or in the backward pass"
    assert not py_spy() or "py-spy: Process" in log or "py-spy: Error" in log, "its native code's stack, where that may be looked at"


@pytest.mark.slow
def test_what_is_wrong_from_the_start_is_told_at_once(documents: Path, tmp_path: Path) -> None:
    """A compiler that does not work, which a rank finds out in its first step."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 4, "compile_cache": str(tmp_path / "kernels")},
                          parallel={"micro_batch": 4, "compile": True})  # fmt: skip
    done = regrowth("train", config, env={**os.environ, "CXX": "/bin/false"})
    assert done.returncode == 1 and "InvalidCxxCompiler" in one_letter(done.stdout + done.stderr)
    assert "Starting again" not in done.stdout
    assert [e["event"] for e in only_run(tmp_path).rows("events")].count("failed") == 1


@pytest.mark.slow
def test_who_stops_a_run_between_two_starts_is_heard(documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, parallel={"micro_batch": 4},
                          supervision={"backoff_seconds": 600.0})  # fmt: skip
    launcher = start("train", config)
    wait_for(lambda: steps_done(tmp_path) > 3, launcher)
    os.kill(workers(launcher)[0], signal.SIGKILL)
    wait_for(lambda: any(e["event"] == "failed" for e in only_run(tmp_path).rows("events")), launcher)
    launcher.send_signal(signal.SIGTERM)
    output = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 75 and "stopped between two starts" in one_letter(output)


def test_ctrl_c_leaves_a_resumable_run_and_says_how(undisturbed: list[float], documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 60}, **TWO)
    launcher = start("train", config)
    wait_for(lambda: steps_done(tmp_path) > 7, launcher)
    launcher.send_signal(signal.SIGINT)
    output = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 75
    run = only_run(tmp_path)
    assert f"regrowth train --resume {run.path}" in one_letter(output)
    stopped = next(e["step"] for e in run.rows("events") if e["event"] == "stopped")
    assert len(losses(run)) == stopped, "the step it was in was finished and kept"
    assert regrowth("train", "--resume", run.path).returncode == 0
    assert losses(run) == undisturbed


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_ranks_behind(documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, **TWO)
    launcher = start("train", config)
    wait_for(lambda: steps_done(tmp_path) > 3, launcher)
    pids = list(workers(launcher).values())
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(_alive(pid) for pid in pids), seconds=30)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_disk_during_a_checkpoint_is_told_and_the_last_one_stands(documents: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000, "folder": str(disk / "runs")}, **TWO)
        launcher = start("train", config)
        wait_for(lambda: list(disk.glob("runs/*/checkpoints/step-*")), launcher)
        (run,) = disk.glob("runs/*_*")
        with (disk / "ballast").open("wb") as ballast:  # whatever else fills a disk
            ballast.write(b"x" * max(0, shutil.disk_usage(disk).free - 150_000))
        output = launcher.communicate(timeout=90)[0]
        letter = one_letter(output)
        assert launcher.returncode == 1 and "the disk is full" in letter and "MiB free" in letter, output
        assert list(run.glob("checkpoints/step-*")), "the last whole checkpoint stands"
        assert not list(run.glob("checkpoints/.*"))
        (disk / "ballast").unlink()
        last = max(int(p.name.split("-")[1]) for p in run.glob("checkpoints/step-*"))
        done = regrowth("train", "--resume", run, "checkpoint.keep=1", f"run.steps={last + 4}")
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_half_written_shard_is_refused_by_name(documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path)
    assert regrowth("data", "prepare", config).returncode == 0
    shard = next((tmp_path / "prepared").glob("*/train/prose/00000-000.arrow"))
    shard.write_bytes(shard.read_bytes()[:1000])
    done = regrowth("train", config)
    letter = one_letter(done.stdout + done.stderr)
    assert done.returncode == 2 and "train/prose/00000-000.arrow: damaged, 1,000 bytes" in letter


@pytest.mark.slow
def test_a_model_smaller_than_its_tokenizer_is_refused_and_a_larger_one_is_noted(documents: Path, corpus, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 2})
    given = json.dumps(str(corpus.folder / "tokenizer"))
    done = regrowth("train", config, f"data.tokenizer.path={given}", "model.vocabulary=300")
    assert done.returncode == 2 and "model.vocabulary = 300 is smaller than the tokenizer's 384 ids" in one_letter(
        done.stdout + done.stderr
    )
    done = regrowth("train", config, "model.vocabulary=512", "data.tokenizer.vocabulary=300")
    assert done.returncode == 0 and "model.vocabulary = 512, the tokenizer has 300 ids" in done.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_under_torchrun_the_command_is_one_of_the_ranks(ranks: int, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 3}, **TWO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "regrowth",
        "train",
        str(config),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ranks == 2:
        assert done.returncode == 0, done.stderr
        assert only_run(tmp_path).finished
    else:
        assert done.returncode != 0 and not list((tmp_path / "runs").glob("*")), "refused before anything was made"
        assert "error: the plan needs 2 processes (dp_shard = 2), 3 were started" in done.stderr


def test_ctrl_c_while_data_is_prepared_keeps_what_is_done(tmp_path: Path) -> None:
    """SIGINT to the whole process group, as a terminal sends it."""
    from tests.conftest import prose, small_data_values, write_jsonl

    for i in range(80):
        write_jsonl(tmp_path / f"in/f{i:02d}.jsonl", [{"text": prose(1000 * i + j, 40), "domain": "p"} for j in range(150)])
    data = {**small_data_values(tmp_path / "in", tmp_path / "prepared"), "workers": 2}
    config = write_config(tmp_path / "c.toml", tmp_path / "in", tmp_path, data=data)
    process = start("data", "prepare", config, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob("prepared/*/phases/0-curate/part-*.json"))) > 3, process)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "the same command goes on from there" in one_letter(output)
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("prepared/*/phases/0-curate/part-*.json")}
    assert 3 < len(done) < 40
    assert regrowth("data", "prepare", config).returncode == 0
    assert all(p.stat().st_mtime_ns == before for p, before in done.items())
