"""What a cluster does to a job: put back into the queue, cancelled, a node that dies, a controller that is restarted. On a real Slurm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.helpers import (
    happened,
    only_run,
    ranks_on_this_host,
    regrowth,
    soon_after_a_checkpoint,
    steps_done,
    submitted,
    wait_for,
    write_config,
)
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slow
TWO = {"parallel": {"dp_shard": 2, "micro_batch": 2}, "checkpoint": {"every": 5}}


def state(cluster: SlurmCluster, job: str) -> str:
    """Of a job, as the controller has it; empty if it does not answer."""
    told = cluster.ask("scontrol", "show", "job", job)
    return told.split("JobState=")[1].split()[0] if "JobState=" in told else ""


def test_a_requeued_job_takes_its_run_up_unless_its_config_has_changed(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, **TWO)
    job, logs = submitted(config, minutes=10)
    wait_for(lambda: soon_after_a_checkpoint(tmp_path), seconds=150)
    cluster.ask("scontrol", "requeue", job)
    wait_for(lambda: happened(tmp_path, "resumed"), seconds=200)
    run = only_run(tmp_path)
    assert happened(tmp_path, "resumed")[0]["step"] >= 5
    config.write_text(config.read_text().replace("lr = 0.003", "lr = 0.001"))
    reached = run.checkpointed
    wait_for(lambda: run.checkpointed > reached, seconds=60)
    cluster.ask("scontrol", "requeue", job)
    wait_for(lambda: state(cluster, job) in ("FAILED", "COMPLETED"), seconds=200)
    told = "".join(path.read_text() for path in logs.glob("*.log"))
    assert "optimizer.lr was 0.003, is 0.001" in told and f"regrowth launch resume {run.path} optimizer.lr=0.001" in told, told[-3000:]
    assert len(happened(tmp_path, "resumed")) == 1, "it did not go on"
    done = regrowth("launch", "resume", run.path, "optimizer.lr=0.001", f"run.steps={run.checkpointed + 4}")
    assert done.returncode == 0 and "Submitted batch job" in done.stdout, done.stderr
    wait_for(lambda: run.finished, seconds=150)
    assert run.rows("metrics")[-1]["lr"] <= 0.001


def test_scancel_ends_a_job_for_good(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, **TWO)
    job, _ = submitted(config, minutes=10)
    wait_for(lambda: steps_done(tmp_path) > 6, seconds=150)
    cluster.ask("scancel", job)
    wait_for(lambda: state(cluster, job) == "CANCELLED", seconds=60)
    time.sleep(15)  # in which it would go back into the queue
    assert state(cluster, job) == "CANCELLED" and not happened(tmp_path, "requeued")
    done = regrowth("train", "--resume", only_run(tmp_path).path, f"run.steps={steps_done(tmp_path) + 3}")
    assert done.returncode == 0, done.stderr


def test_the_death_of_a_node_puts_the_job_into_the_queue_and_it_takes_its_run_up_on_others(
    cluster: SlurmCluster, documents: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, **TWO)
    job, _ = submitted(config, minutes=10)
    wait_for(lambda: soon_after_a_checkpoint(tmp_path), seconds=150)
    cluster.kill_node("n2")
    wait_for(lambda: happened(tmp_path, "resumed"), seconds=240)
    reached = happened(tmp_path, "resumed")[0]["step"]
    assert reached >= 5
    wait_for(lambda: steps_done(tmp_path) > reached + 2, seconds=60)
    used = cluster.ask("scontrol", "show", "job", job).split(" NodeList=")[1].split()[0]
    assert "n2" not in subprocess.run(["scontrol", "show", "hostnames", used], capture_output=True, text=True, timeout=20).stdout.split()
    cluster.ask("scancel", job)


def test_a_job_with_a_spare_node_goes_on_by_itself_when_one_dies(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, **TWO)
    job, logs = submitted(config, minutes=10, spares=1)
    wait_for(lambda: soon_after_a_checkpoint(tmp_path), seconds=150)
    cluster.kill_node("n2")
    wait_for(lambda: happened(tmp_path, "resumed"), seconds=240)
    (failed,), reached = happened(tmp_path, "failed"), happened(tmp_path, "resumed")[0]["step"]
    assert "node n2 failed" in failed["reason"] and failed["lost_steps"] <= 6 and reached >= 5
    wait_for(lambda: steps_done(tmp_path) > reached + 2, seconds=60)
    run = only_run(tmp_path)
    assert not happened(tmp_path, "requeued") and "Restarts=0" in cluster.ask("scontrol", "show", "job", job)
    assert len(list(logs.glob("slurm-*.log"))) == 1
    cluster.ask(
        "scancel", "--signal=KILL", f"{job}.1"
    )  # no node has failed this time: the job does not go to other nodes, but into the queue
    wait_for(lambda: happened(tmp_path, "requeued"), seconds=90)
    assert "no further node has failed" in next(logs.glob("slurm-*.log")).read_text() and not run.finished
    cluster.ask("scancel", job)


def test_an_elastic_run_goes_on_with_fewer_replicas_on_the_same_samples(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 60},
                          supervision={"elastic": True, "on_end": f'echo "$REGROWTH_MESSAGE" > {tmp_path}/told'}, **TWO)  # fmt: skip
    job, _ = submitted(config, minutes=10)
    wait_for(lambda: soon_after_a_checkpoint(tmp_path), seconds=150)
    cluster.kill_node("n2")
    wait_for(lambda: only_run(tmp_path).finished, seconds=240)
    assert "Restarts=0" in cluster.ask("scontrol", "show", "job", job)
    wait_for(lambda: (tmp_path / "told").exists(), seconds=60)
    assert "finished" in (tmp_path / "told").read_text()
    (fewer,) = happened(tmp_path, "fewer replicas")
    assert (fewer["nodes"], fewer["of"]) == (1, 2)
    elsewhere = tmp_path / "undisturbed"
    done = regrowth("train", write_config(tmp_path / "d.toml", documents, elsewhere, run={"steps": 60}, **TWO))
    assert done.returncode == 0, done.stderr
    run, reference = only_run(tmp_path), only_run(elsewhere)
    assert [row["draws"] for row in run.decisions()] == [row["draws"] for row in reference.decisions()]
    ours, theirs = ([row["loss"] for row in r.rows("metrics")] for r in (run, reference))
    assert ours == pytest.approx(theirs, rel=1e-4), "sums in another order, no more"
    assert run.config().parallel.dp_shard == 2, "the next start has all its ranks again"


def test_a_controller_that_is_killed_and_started_again_is_not_noticed_by_a_run(
    cluster: SlurmCluster, documents: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 150}, **TWO)
    job, _ = submitted(config, minutes=10)
    wait_for(lambda: steps_done(tmp_path) > 6, seconds=150)
    cluster.kill_controller()
    done = regrowth("launch", "status", only_run(tmp_path).path)
    assert done.returncode == 1 and "the controller may be down" in done.stderr, done.stdout + done.stderr
    time.sleep(3)
    cluster.start_controller()
    wait_for(lambda: only_run(tmp_path).finished, seconds=200)
    assert not happened(tmp_path, "failed") and len(only_run(tmp_path).rows("metrics")) == 150
    wait_for(lambda: state(cluster, job) == "COMPLETED", seconds=60)


def test_ranks_that_hang_in_a_job_are_found_and_started_again(cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 400}, supervision={"hang_seconds": 5.0}, **TWO)
    job, logs = submitted(config, minutes=10)
    wait_for(lambda: steps_done(tmp_path) > 80, seconds=150)  # of which the watch, which begins a moment later, has seen ten
    run = only_run(tmp_path)
    os.kill(max(ranks_on_this_host(run)), signal.SIGSTOP)
    wait_for(lambda: happened(tmp_path, "resumed"), seconds=120)
    (failed,) = happened(tmp_path, "failed")
    assert "hung: no rank did anything for" in failed["reason"], failed
    assert any("forward_backward" in (run.path / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)), "where the other one waited"
    wait_for(lambda: run.finished, seconds=150)
    assert len(run.rows("metrics")) == 400 and len(list(logs.glob("*.log"))) == 1 and not happened(tmp_path, "requeued")
    wait_for(lambda: state(cluster, job) == "COMPLETED", seconds=60)
