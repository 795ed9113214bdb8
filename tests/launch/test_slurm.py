"""Slurm: the script is right on paper for every name, and runs on a real (virtual) cluster where there is one."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from regrowth.errors import UserError
from regrowth.launch import slurm as slurm_module
from regrowth.launch.slurm import JobOptions, render, submit
from tests.launch.helpers import (
    happened,
    only_run,
    ranks_on_this_host,
    soon_after_a_checkpoint,
    steps_done,
    submitted,
    wait_for,
    write_config,
)
from tests.slurm_cluster import SlurmCluster


def script(config: str = "quickstart", overrides: list[str] | None = None, **options) -> str:  # type: ignore[no-untyped-def]
    return render(config, overrides or [], JobOptions(**{"minutes": 30, **options}))[0]


def trained(text: str) -> str:
    """The words of a script behind the `regrowth` that trains."""
    return text.split("    -m regrowth ")[1].split("\n}\n")[0]


def test_the_script_says_what_was_asked_for() -> None:
    text = script(nodes=2, partition="gpu", account="lab", gpus_per_node=1, setup=["module load cuda"])
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --time=30",
        "module load cuda",
    ):
        assert line in text.splitlines()
    assert '--nnodes="$count" --nproc-per-node=1' in text  # of the nodes that it is started on: all of them, but for spare ones
    assert "--partition" not in script()


def test_user_strings_reach_the_command_as_they_are(tmp_path: Path) -> None:
    nasty = 'run.name=it\'s "$(touch pwned)" & more'
    text = script(overrides=[nasty])
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert shlex.split(trained(text)) == ["train", str((Path(__file__).parents[2] / "configs/quickstart.toml").resolve()), nasty]


def test_a_runs_folder_is_gone_on_with(documents: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    write_config(folder / "config.toml", documents, tmp_path)
    text = script(str(folder), ["checkpoint.keep=9"])
    assert shlex.split(trained(text)) == [
        "train",
        "--resume",
        str(folder),
        "checkpoint.keep=9",
    ]


def test_a_template_of_ones_own_takes_the_place_of_ours(tmp_path: Path) -> None:
    ours = (Path(slurm_module.__file__).parent / "slurm.sh.jinja").read_text()
    own = tmp_path / "own.jinja"
    own.write_text(ours.replace("set -euo pipefail", "set -euo pipefail\necho hello from {{ name }}"))
    assert "echo hello from" in script(template=str(own)) and "echo hello" not in script()
    for text, told in (
        ("{{ partitoin }}", "'partitoin' is undefined. What a template can have filled in: account,"),
        ("{% if %}", "line 1: "),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=re.escape(told)):
            script(template=str(own))
    with pytest.raises(UserError, match="cannot be read"):
        script(template=str(tmp_path / "nowhere"))


def test_a_line_break_in_an_option_is_refused() -> None:
    with pytest.raises(UserError, match="--partition: holds a line break"):
        script(partition="x\n#SBATCH --uid=0")


def test_without_slurm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        submit("#!/bin/bash\n")


def test_a_run_on_two_nodes_of_a_real_slurm(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 4}, parallel={"dp_shard": 2, "micro_batch": 2})
    # The virtual nodes share this host: ranks meet on loopback.
    setup = ["export REGROWTH_RENDEZVOUS=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]
    text, logs = render(str(config), [], JobOptions(nodes=2, partition="ci", minutes=5, setup=setup))
    logs.mkdir(parents=True, exist_ok=True)
    assert "Submitted batch job" in submit(text)
    until = time.monotonic() + 120
    while time.monotonic() < until and subprocess.run(["squeue", "-h"], capture_output=True, text=True, timeout=20).stdout.strip():
        time.sleep(0.5)
    told = "\n".join(p.read_text() for p in logs.glob("*.log"))
    assert list((tmp_path / "runs").glob("*_*/metrics.jsonl")), told
    run = only_run(tmp_path)
    assert run.finished and len(run.rows("metrics")) == 4, told


@pytest.mark.slow
def test_a_job_that_a_growth_ends_hands_over_to_one_of_more_nodes(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    growth = [{"at_step": 2, "operators": [{"op": "stack"}], "parallel": {"dp_shard": 2}}]
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 4}, growth=growth)
    setup = ["export REGROWTH_RENDEZVOUS=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]
    text, logs = render(str(config), [], JobOptions(partition="ci", minutes=5, setup=setup, ranks_per_node=1))
    logs.mkdir(parents=True, exist_ok=True)
    submit(text)
    until = time.monotonic() + 200
    while time.monotonic() < until and not (list((tmp_path / "runs").glob("*_*/events.jsonl")) and only_run(tmp_path).finished):
        time.sleep(0.5)
    told = "\n".join(p.read_text() for p in logs.glob("*.log"))
    run = only_run(tmp_path)
    assert run.finished and [row["layers"] for row in run.rows("metrics")] == [2, 2, 4, 4], told
    assert "Submitted batch job" in told and len(list(logs.glob("slurm-*.log"))) == 2, told
    nodes = subprocess.run(["scontrol", "show", "job"], capture_output=True, text=True, timeout=20).stdout
    assert "NumNodes=1" in nodes and "NumNodes=2" in nodes, nodes


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, -1])
def test_a_lost_rank_is_started_again_in_the_same_job(which: int, cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 60}, parallel={"dp_shard": 2, "micro_batch": 2},
                          checkpoint={"every": 5})  # fmt: skip
    _, logs = submitted(config, minutes=5)
    wait_for(lambda: soon_after_a_checkpoint(tmp_path), seconds=120)
    os.kill(sorted(ranks_on_this_host(only_run(tmp_path)))[which], signal.SIGKILL)
    wait_for(lambda: only_run(tmp_path).finished, seconds=180)
    run = only_run(tmp_path)
    (failed,) = happened(tmp_path, "failed")
    assert "torchrun started all of them again" in failed["reason"] and failed["lost_steps"] <= 6
    assert len(run.rows("metrics")) == 60 and happened(tmp_path, "resumed")[-1]["step"] >= 10
    assert len(list(logs.glob("slurm-*.log"))) == 1


@pytest.mark.slow
def test_a_job_at_its_time_limit_goes_into_the_queue_again_and_takes_its_run_up(
    cluster: SlurmCluster, documents: Path, tmp_path: Path
) -> None:
    """A job that is put into the queue again waits two minutes there, by Slurm's own rule."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, parallel={"dp_shard": 2, "micro_batch": 2})
    job, logs = submitted(config, minutes=3)
    wait_for(lambda: happened(tmp_path, "requeued"), seconds=150)
    (requeued,), (stopped,) = happened(tmp_path, "requeued"), happened(tmp_path, "stopped")
    assert requeued["job"] == job and requeued["checkpoint"] == stopped["step"] and not happened(tmp_path, "failed")
    wait_for(lambda: happened(tmp_path, "resumed") and steps_done(tmp_path) > stopped["step"], seconds=300)
    subprocess.run(["scancel", job], check=True, timeout=20)
    assert len(list(logs.glob("slurm-*.log"))) == 1, "the same job, one log"


def test_what_slurm_refuses_is_told_in_its_own_words(cluster: SlurmCluster) -> None:
    with pytest.raises(UserError, match=r"Slurm refused the job: .*partition"):
        submit(script(partition="nowhere"))
