"""Chains of stages: made in order, made again only where something changed, on this machine and as Slurm jobs."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.corpus import Corpus
from regrowth.launch.slurm import queued
from regrowth.pretrain.run_folder import RunFolder
from tests.launch.helpers import call, one_letter, regrowth, start, wait_for, write_config
from tests.slurm_cluster import SlurmCluster

SHELL_CHAIN = """
name = "shell"
folder = "chain"

[[stages]]
name = "last"
shell = "test -e ready; cat {middle}/it > {out}/it"

[[stages]]
name = "first"
shell = "cp source {out}/it"
uses = ["source"]

[[stages]]
name = "middle"
shell = "cat {first}/it {first}/it > {out}/it"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def states(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, chain: str = "chain.toml") -> dict[str, dict[str, Any]]:
    """What the status says of each stage."""
    code, told = call(capsys, monkeypatch, "launch", "pipeline", chain, "--status", "--json")
    assert code == 0, told
    return {row["stage"]: row for row in json.loads(told)}


def test_stages_are_made_in_their_order_and_again_only_where_something_changed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*more: str) -> tuple[int, str]:
        return call(capsys, monkeypatch, "launch", "pipeline", "chain.toml", *more)

    def seen() -> dict[str, str]:
        return {name: row["state"] for name, row in states(capsys, monkeypatch).items()}

    (here / "chain.toml").write_text(SHELL_CHAIN)
    (here / "source").write_text("a")
    assert seen() == {"first": "waiting", "middle": "waiting", "last": "waiting"}
    code, told = make("--dry-run")
    assert code == 0 and "cp source" in told and not (here / "chain").exists()

    code, told = make()
    assert code == 1 and "stage last ended with exit code 1" in one_letter(told)
    assert seen() == {"first": "finished", "middle": "finished", "last": "failed"}
    (here / "ready").touch()
    code, told = make()
    assert code == 0 and "stage first:" not in told and (here / "chain/last/it").read_text() == "aa"
    assert "stage" not in make()[1].replace("all stages", ""), "nothing is left to do"
    code, table = call(capsys, monkeypatch, "launch", "pipeline", "chain.toml", "--status")
    assert code == 0 and table.count("finished") == 3

    (here / "source").write_text("b")
    rows = states(capsys, monkeypatch)
    assert rows["first"]["state"] == "stale" and rows["first"]["told"] == "source has changed"
    assert rows["last"]["state"] == "stale" and "comes first" in rows["last"]["told"]
    assert make()[0] == 0 and (here / "chain/last/it").read_text() == "bb"
    assert (here / "chain/first.before-1/it").read_text() == "a", "what was there is put aside"

    (here / "chain.toml").write_text(SHELL_CHAIN.replace("{first}/it {first}/it >", "{first}/it >"))
    assert seen() == {"first": "finished", "middle": "stale", "last": "stale"}
    assert make()[0] == 0 and (here / "chain/last/it").read_text() == "b"
    code, told = make("--from", "middle")
    assert code == 0 and "stage first:" not in told and "stage middle:" in told and "stage last:" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SHELL_CHAIN.replace("{first}/it {first}", "{frist}/it {first}"), "there is no stage frist"),
        (SHELL_CHAIN.replace("cp source", "cp {last}/it"), "wait for each other"),
        (SHELL_CHAIN.replace("{middle}/it", "{middle.run}/it"), "stage middle trains nothing"),
        (SHELL_CHAIN.replace('shell = "cp', 'run = "train x"\nshell = "cp'), "one of them"),
        (SHELL_CHAIN.replace('name = "middle"', 'name = "first"'), "two have the name first"),
        (SHELL_CHAIN.replace('name = "middle"', 'name = "out"'), 'stages.2.name'),
        (SHELL_CHAIN.replace("uses", "use"), "stages.1.use"),
        (SHELL_CHAIN + "slurm = { minuets = 3 }", "minuets"),
        (SHELL_CHAIN.replace('shell = "cp source {out}/it"', 'run = "train --resume x"'), "name the config first"),
        (SHELL_CHAIN.replace("cp source {out}/it", "cp 'source {out}/it"), "not a command line"),
    ],
)  # fmt: skip
def test_a_chain_that_cannot_be_is_refused(
    text: str, told: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "chain.toml").write_text(text)
    code, output = call(capsys, monkeypatch, "launch", "pipeline", "chain.toml")
    assert code == 2 and told in one_letter(output) and not (here / "chain").exists()


def test_a_stage_whose_maker_is_killed_is_not_made_twice_at_once_and_goes_on_later(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = "echo $$ >> {out}/pids; while test ! -e go; do sleep 0.1; done; touch {out}/it"
    (here / "chain.toml").write_text(f'name = "x"\nfolder = "chain"\n[[stages]]\nname = "one"\nshell = "{shell}"\n')
    maker = start("launch", "pipeline", "chain.toml", cwd=here)
    pids = here / "chain/one/pids"
    wait_for(pids.exists, maker)
    maker.kill()
    maker.wait()
    assert states(capsys, monkeypatch)["one"]["state"] == "running", "the command lives on"
    done = regrowth("launch", "pipeline", "chain.toml", "--from", "one", cwd=here)
    assert done.returncode == 2 and "stage one is running" in one_letter(done.stderr)
    os.killpg(int(pids.read_text()), signal.SIGKILL)
    wait_for(lambda: states(capsys, monkeypatch)["one"]["state"] == "lost")

    maker = start("launch", "pipeline", "chain.toml", cwd=here)
    wait_for(lambda: len(pids.read_text().split()) == 2, maker)
    maker.send_signal(signal.SIGTERM)
    assert maker.wait(30) == 75 and "stage one was stopped" in one_letter(maker.stdout.read() if maker.stdout else "")
    assert states(capsys, monkeypatch)["one"]["state"] == "stopped"
    (here / "go").touch()
    assert call(capsys, monkeypatch, "launch", "pipeline", "chain.toml")[0] == 0
    assert len(pids.read_text().split()) == 3 and not (here / "chain/one.before-1").exists(), "it went on in its folder"


def train_chain(here: Path, corpus: Corpus, documents: Path, shell: str, more: str = "", **sections: Any) -> None:
    """A chain that trains and looks at its run."""
    write_config(here / "small.toml", documents, here, checkpoint={"every": 4}, **sections)
    (here / "chain.toml").write_text(f"""
name = "small"
folder = "chain"
[slurm]
partition = "ci"
minutes = 5
cpus = 1
setup = ["export REGROWTH_RENDEZVOUS=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]
[[stages]]
name = "train"
run = "train small.toml loader.corpus={corpus.folder}"
{more}
[[stages]]
name = "look"
shell = "{shell}"
""")


def test_a_training_stage_that_is_stopped_goes_on_from_its_checkpoint(
    here: Path, corpus: Corpus, documents: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_chain(here, corpus, documents, "wc -l < {train.run}/metrics.jsonl > {out}/steps", run={"steps": 60})
    maker = start("launch", "pipeline", "chain.toml", cwd=here)
    wait_for(lambda: list((here / "chain/train").glob("*_small/checkpoints/step-*")), maker)
    maker.send_signal(signal.SIGTERM)
    maker.wait(60)
    assert states(capsys, monkeypatch)["train"]["state"] == "stopped"
    assert regrowth("launch", "pipeline", "chain.toml", cwd=here).returncode == 0
    assert {row["state"] for row in states(capsys, monkeypatch).values()} == {"finished"}
    run = RunFolder(here / "chain/train/run")
    assert int((here / "chain/look/steps").read_text()) == 60
    assert run.rows("events")[-1]["event"] == "finished" and [e for e in run.rows("events") if e["event"] == "resumed"]
    assert len(list((here / "chain/train").glob("*_small*"))) == 1


@pytest.mark.slow
def test_stages_as_slurm_jobs_wait_for_each_other_also_when_a_growth_hands_over_to_another_job(
    cluster: SlurmCluster, here: Path, corpus: Corpus, documents: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = "test -e ready; wc -l < {train.run}/metrics.jsonl > {out}/steps"
    growth = [{"at_step": 2, "operators": [{"op": "stack"}], "parallel": {"dp_shard": 2}}]
    train_chain(here, corpus, documents, look, "slurm = { ranks_per_node = 1 }", run={"steps": 4}, growth=growth)
    code, told = call(capsys, monkeypatch, "launch", "pipeline", "chain.toml", "--slurm")
    assert code == 0 and told.count(": job ") == 2, told
    rows = states(capsys, monkeypatch)
    assert rows["look"]["state"] == "queued", "it waits for the training"
    code, again = call(capsys, monkeypatch, "launch", "pipeline", "chain.toml", "--slurm")
    assert code == 0 and ": job " not in again, "what is in the queue is not submitted again"

    def settled() -> bool:
        return not queued([row["job"] for row in states(capsys, monkeypatch).values()])

    wait_for(settled, seconds=240)
    rows = states(capsys, monkeypatch)
    assert rows["train"]["state"] == "finished" and rows["look"]["state"] == "failed", rows
    assert RunFolder(here / "chain/train/run").rows("metrics")[-1]["layers"] == 4
    assert not (here / "chain/train.before-1").exists() and len(list((here / "chain/train/slurm").glob("*.log"))) == 2
    (here / "ready").touch()
    code, told = call(capsys, monkeypatch, "launch", "pipeline", "chain.toml", "--slurm")
    assert code == 0 and told.count(": job ") == 1 and "stage look" in told
    wait_for(settled, seconds=120)
    assert states(capsys, monkeypatch)["look"]["state"] == "finished" and (here / "chain/look/steps").read_text().strip() == "4"
