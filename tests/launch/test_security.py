"""What others on the machine and the cluster may see of a run."""

import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from regrowth.errors import UserError
from regrowth.launch.slurm import JobOptions, render
from tests.faults.test_real_faults import workers
from tests.launch.helpers import only_run, ranks_on_this_host, start, steps_done, submitted, wait_for, write_config
from tests.slurm_cluster import SlurmCluster

SECRET = "hunter2-of-the-environment"


LOOPBACK = {socket.inet_aton("127.0.0.1")[::-1].hex().upper(), "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def listening(pid: int) -> set[str]:
    """The addresses, as the kernel writes them in hexadecimal, at which a process listens."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(fd.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found


def test_a_run_on_one_machine_is_private_and_reached_from_nowhere(documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, parallel={"dp_shard": 2, "micro_batch": 2})
    launcher = start("train", config, env={**os.environ, "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET})
    try:
        wait_for(lambda: steps_done(tmp_path) > 3, launcher)
        ranks = workers(launcher)
        assert len(ranks) == 2 and all(listening(pid) <= LOOPBACK for pid in (*ranks.values(), launcher.pid))
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=60)
    run = only_run(tmp_path)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    for path in run.path.rglob("*"):
        if path.is_file() and path.name != "code.patch":  # which would have this file, while it is being written
            assert SECRET.encode() not in path.read_bytes(), f"{path} holds a secret"


@pytest.mark.slow
def test_a_job_whose_meeting_point_is_an_address_listens_there_alone(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, parallel={"dp_shard": 2, "micro_batch": 2})
    job, _ = submitted(config, minutes=5)
    wait_for(lambda: steps_done(tmp_path) > 3, seconds=150)
    ranks = ranks_on_this_host(only_run(tmp_path))
    agents = {int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in ranks}
    assert len(agents) == 2 and all(listening(pid) <= LOOPBACK for pid in (*ranks, *agents))
    assert any(listening(pid) for pid in agents), "torchrun's meeting point"
    cluster.ask("scancel", job)


def test_no_batch_script_holds_the_environment(documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    text, _ = render(str(write_config(tmp_path / "c.toml", documents, tmp_path)), [], JobOptions())
    assert SECRET not in text


NASTY = 'it\'s "my" $(touch pwned) %j & `id`'


@pytest.mark.slow
def test_a_folder_with_every_sign_of_the_shell_in_its_name_works_on_a_real_slurm(
    cluster: SlurmCluster, documents: Path, tmp_path: Path
) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    config = write_config(folder / "my config.toml", documents, folder, run={"steps": 4}, parallel={"dp_shard": 2, "micro_batch": 2})
    _, logs = submitted(config, minutes=5)
    wait_for(lambda: list((folder / "runs").glob("*_*/events.jsonl")) and only_run(folder).finished, seconds=150)
    assert list(logs.glob("slurm-*.log")), "the log is where it was asked to be"
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_a_backslash_is_refused_for_logs(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder with a backslash in its name"):
        render(str(write_config(tmp_path / "c.toml", documents, tmp_path / "a\\\\b")), [], JobOptions())


@pytest.mark.parametrize("name", [NASTY, "-rf", "$HOME", "a;b", "a|b", "~", "*", "ü ß"])
def test_every_user_string_is_one_word_of_the_shell(name: str, documents: Path, tmp_path: Path) -> None:
    """Bash itself is asked what the script's words are: `srun` is replaced by what prints its arguments."""
    config = write_config(tmp_path / f"c {name.replace('/', '')}.toml", documents, tmp_path)
    override = f"run.folder={json.dumps(str(tmp_path / name))}"
    text, logs = render(str(config), [override], JobOptions())
    logs.parent.mkdir(parents=True, exist_ok=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool, body in (("srun", 'printf "%s\\0" "$@" > "$WORDS"'), ("scontrol", "echo here")):
        (tools / tool).write_text(f"#!/bin/bash\n{body}\n")
        (tools / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "WORDS": str(tmp_path / "words"), "SLURM_JOB_ID": "1",
                   "SLURM_JOB_NODELIST": "x"}  # fmt: skip
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text().split("\0")[-4:-1] == ["train", str(config.resolve()), override]
