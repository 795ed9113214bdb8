"""Ranks that mpirun or srun start: who they are, where they meet, and that it is the same training."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regrowth.errors import UserError
from regrowth.files import read_json, write_json
from regrowth.launch.place import place_of, state_of
from regrowth.launch.rendezvous import Standing, first_host, meeting, standing
from tests.launch.helpers import call, happened, one_letter, only_run, ranks_on_this_host, regrowth, steps_done, wait_for, write_config
from tests.slurm_cluster import SlurmCluster

STEP = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1",
}


@pytest.fixture(scope="module")
def mpirun() -> Callable[..., list[str]]:
    """The command that starts so many ranks of a program."""
    pytest.importorskip("mpi4py", reason="needs the mpi extra")
    program = Path(sys.executable).parent / "mpirun"
    if not program.exists():
        pytest.skip("no mpirun beside this Python (the mpi extra brings one)")
    return lambda ranks, *arguments: [str(program), "-n", str(ranks), sys.executable, *map(str, arguments)]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),  # a batch script
        (STEP, Standing(9, 12, 1, 3)),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, Standing(1, 4, 1, 2)),
        ({"PMI_RANK": "9", "PMI_SIZE": "12", **STEP}, Standing(9, 12, 1, 3)),  # srun --mpi=pmi2
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", **STEP},
            Standing(1, 4, 1, 2),
        ),  # mpirun in a job
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            },
            Standing(3, 4, 0, 1),
        ),
    ],
)
def test_the_environment_says_which_rank_this_is(environment: dict[str, str], expected: Standing | None) -> None:
    assert standing(environment) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("frontier[00123-00126,00130],other", "frontier00123"),
        ("a9,b[1-2]", "a9"),
        ("r[2,7]c[05-06]", "r2c05"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_under_plain_srun_all_ranks_come_to_the_same_place() -> None:
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "n[05-06]", "SLURM_JOB_NODELIST": "n[04-06]"}
    told = [meeting(job, Standing(rank, 4, rank % 2, 2), None) for rank in range(4)]
    assert {(t["MASTER_ADDR"], t["MASTER_PORT"]) for t in told} == {("n05", told[0]["MASTER_PORT"])}
    assert 20000 <= int(told[0]["MASTER_PORT"]) < 32000 and [t["LOCAL_RANK"] for t in told] == ["0", "1", "0", "1"]
    assert meeting(job, Standing(0, 2, 0, 2), None)["MASTER_ADDR"] == "127.0.0.1", "ranks of one host stay on loopback"
    other_step = meeting({**job, "SLURM_STEP_ID": "3"}, Standing(0, 4, 0, 2), None)
    assert other_step["MASTER_PORT"] != told[0]["MASTER_PORT"]
    named = meeting({**job, "MASTER_ADDR": "hsn0", "MASTER_PORT": "29500"}, Standing(3, 4, 1, 2), None)
    assert (named["MASTER_ADDR"], named["MASTER_PORT"], named["RANK"], named["WORLD_SIZE"]) == ("hsn0", "29500", "3", "4")


def test_ranks_that_cannot_tell_each_other_anything_are_told_what_to_do() -> None:
    with pytest.raises(UserError, match=r"mpi4py is missing or made for another MPI.*MASTER_ADDR"):
        meeting({}, Standing(0, 4, 0, 2), None)


def test_started_alone_it_says_how_to_start_it(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, parallel={"dp_shard": 2, "micro_batch": 2})
    code, output = call(capsys, monkeypatch, "launch", "mpi", config, "parallel.dp_shard=4", "run.name=two words")
    told = one_letter(output)
    assert code == 2 and "the plan needs 4 ranks" in told
    assert f"mpirun -n 4 regrowth launch mpi {config} parallel.dp_shard=4 'run.name=two words'" in told
    assert "srun --ntasks=4 --kill-on-bad-exit=1" in told and not (tmp_path / "runs").exists()


def test_the_losses_are_those_of_the_local_launcher_to_the_bit(mpirun: Callable[..., list[str]], documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 4}, parallel={"dp_shard": 2, "micro_batch": 2})
    done = regrowth("train", config)
    assert done.returncode == 0, done.stderr
    local = only_run(tmp_path)
    shutil.move(local.path, tmp_path / "local")
    done = run(mpirun(2, "-m", "regrowth", "launch", "mpi", config))
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = only_run(tmp_path), type(local)(tmp_path / "local")
    for row, other in zip(ours.rows("metrics"), theirs.rows("metrics"), strict=True):
        assert (row["loss"], row["grad_norm"], row["domain_loss"]) == (other["loss"], other["grad_norm"], other["domain_loss"])
    assert [row["bits_per_byte"] for row in ours.rows("evaluations")] == [row["bits_per_byte"] for row in theirs.rows("evaluations")]
    assert ours.finished and f"run {ours.path}" in done.stdout and state_of(ours, {})[0] == "finished"
    assert (place := place_of(ours)) and place.by == "mpi" and (ours.path / "logs/rank-1.log").exists()
    made_with = read_json(ours.path / "environment.json")
    assert made_with["ranks"] == 2 and made_with["device"] and made_with["variables"]["GLOO_SOCKET_IFNAME"] == "lo"
    done = run(mpirun(2, "-m", "regrowth", "launch", "mpi", ours.path))
    assert done.returncode == 0 and done.stdout.count("finished already") == 1


def test_a_plan_of_another_size_is_refused_once(mpirun: Callable[..., list[str]], documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, parallel={"dp_shard": 2, "micro_batch": 2})
    done = run(mpirun(3, "-m", "regrowth", "launch", "mpi", config))
    assert done.returncode == 2 and "needs 2 processes (dp_shard = 2), 3 were started" in one_letter(done.stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_fails_on_one_rank_ends_all_and_is_told_once(mpirun: Callable[..., list[str]], documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, parallel={"dp_shard": 2, "micro_batch": 2})
    (tmp_path / "broken.py").write_text("""
import os, sys
from regrowth.errors import RunFailed
from regrowth.launch.main import main
from regrowth.pretrain.trainer import Trainer
def fail(self):
    raise RunFailed("this rank is ill")
if os.environ["PMI_RANK"] == "1":
    Trainer.run_to_the_end = fail
sys.argv[0] = "regrowth"
main()
""")
    done = run(mpirun(2, tmp_path / "broken.py", "launch", "mpi", config), env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode != 0 and "this rank is ill" in one_letter(done.stderr) and "rank-1.log" in one_letter(done.stderr)
    wait_for(lambda: state_of(only_run(tmp_path), {}) == ("failed", "this rank is ill"), seconds=20)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_can_go_on(
    which: int, mpirun: Callable[..., list[str]], documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, parallel={"dp_shard": 2, "micro_batch": 2})
    started = subprocess.Popen(
        mpirun(2, "-m", "regrowth", "launch", "mpi", config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: steps_done(tmp_path) > 8, started)
    ours = only_run(tmp_path)
    assert state_of(ours, {})[0] == "running"
    os.kill(sorted(ranks_on_this_host(ours))[which], signal.SIGKILL)
    output = started.communicate(timeout=60)[0]
    assert started.returncode != 0, output
    wait_for(lambda: not ranks_on_this_host(ours) and state_of(ours, {})[0] in ("lost", "failed"), seconds=20)
    code, output = call(capsys, monkeypatch, "launch", "resume", ours.path)
    assert code == 2 and f"mpirun -n 2 regrowth launch mpi {ours.path}" in one_letter(output)
    made_with = read_json(ours.path / "environment.json")
    write_json(ours.path / "environment.json", made_with | {"code": {"commit": 40 * "0", "dirty": False}})
    started = subprocess.Popen(mpirun(2, "-m", "regrowth", "launch", "mpi", ours.path, "checkpoint.every=3"), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    wait_for(lambda: happened(tmp_path, "resumed"), started)
    assert len(happened(tmp_path, "config changed")) == 1, "one rank writes it"
    assert happened(tmp_path, "failed")[-1]["lost_steps"] > 0
    assert [event["from"] for event in happened(tmp_path, "code changed")] == ["000000000000"] * bool(made_with["code"])
    wait_for(lambda: state_of(ours, {})[0] == "running", started)
    assert call(capsys, monkeypatch, "launch", "cancel", ours.path)[0] == 0
    output = started.communicate(timeout=120)[0]
    assert started.returncode != 0 and "on request; checkpoint written" in one_letter(output)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_srun_alone_starts_the_ranks_of_a_run(nodes: int, cluster: SlurmCluster, documents: Path, tmp_path: Path) -> None:
    """Without torchrun and without MPI: a killed rank is heard of, and the same command with the run's folder goes on."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 60}, parallel={"dp_shard": 2, "micro_batch": 2},
                          checkpoint={"every": 5})  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PMI")}
    if nodes > 1:  # the virtual nodes share this host and have no addresses
        environment |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    srun = ["srun", "-p", "ci", f"--nodes={nodes}", "--ntasks=2", sys.executable, "-m", "regrowth", "launch", "mpi"]
    started = subprocess.Popen([*srun, str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    wait_for(lambda: steps_done(tmp_path) > 8, started, seconds=120)
    os.kill(sorted(ranks_on_this_host(only_run(tmp_path)))[0], signal.SIGKILL)
    output = started.communicate(timeout=120)[0]
    assert started.returncode != 0 and "lost its connection" in output and not only_run(tmp_path).finished, output
    done = run([*srun, str(only_run(tmp_path).path)], env=environment)
    assert done.returncode == 0 and only_run(tmp_path).finished, done.stdout + done.stderr
    assert len(only_run(tmp_path).rows("metrics")) == 60


def test_a_gpu_that_srun_binds_to_a_task_is_its_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrowth.parallel.mesh import choose_device

    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n1"}
    for name, value in meeting(step, Standing(3, 4, 3, 4), None).items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto").type == "cpu", "four ranks see the same GPU"
    for name, value in meeting({**step, "SLURM_GPUS_PER_TASK": "1"}, Standing(3, 4, 3, 4), None).items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto").index == 0 and choose_device("cuda").type == "cuda" and chosen == [0, 0]


@pytest.mark.slow
def test_the_ranks_of_mpirun_share_the_files_of_an_export(mpirun: Callable[..., list[str]], documents: Path, tmp_path: Path) -> None:
    done = regrowth("train", write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 2}))
    assert done.returncode == 0, done.stderr
    done = run(mpirun(2, "-m", "regrowth", "convert", only_run(tmp_path).path, tmp_path / "two", "--file-gigabytes", "0.00002"))
    assert done.returncode == 0 and done.stdout.count("written from") == 1, done.stdout + done.stderr
    alone = regrowth("convert", only_run(tmp_path).path, tmp_path / "one", "--file-gigabytes", "0.00002")
    assert alone.returncode == 0, alone.stderr
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) > 5 and files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    done = run(mpirun(2, "-m", "regrowth", "convert", only_run(tmp_path).path, tmp_path / "two"))
    assert done.returncode == 2 and "exists already" in done.stderr
