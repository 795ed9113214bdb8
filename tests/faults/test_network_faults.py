"""Two ranks on two hosts, as far as the kernel can make them: network namespaces joined by a cable, which is pulled out."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import UserError
from regrowth.parallel.mesh import process_group
from tests.faults.helpers import configured, numbers
from tests.launch.helpers import one_letter, only_run, regrowth, steps_done, wait_for

LONG: dict[str, Any] = {"run": {"steps": 300, "timeout_seconds": 8.0, "deterministic": True}, "checkpoint": {"every": 20, "keep": 3}}


class Cable:
    """Two namespaces and the pair of devices that joins them; rank N is at 10.77.0.(N + 1)."""

    def __init__(self) -> None:
        self.hosts = [f"rg{os.getpid()}-{rank}" for rank in range(2)]

    def lay(self) -> None:
        """Make both ends and switch them on."""
        for host in self.hosts:
            _ip("netns", "add", host)
        _ip("link", "add", "cable", "netns", self.hosts[0], "type", "veth", "peer", "name", "cable", "netns", self.hosts[1])
        for rank, host in enumerate(self.hosts):
            _ip("-n", host, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "cable")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "cable", "up")

    def switch(self, state: str) -> None:
        """Let the end of rank 1 be `up` or `down`."""
        _ip("-n", self.hosts[1], "link", "set", "cable", state)

    def remove(self) -> None:
        """Take everything away, however much of it there is."""
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if not shutil.which("ip"):
        pytest.skip("network namespaces need the command `ip` (iproute2)")
    cable = Cable()
    try:
        try:
            cable.lay()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this process may not make network namespaces ({error.stderr.strip()})")
        yield cable
    finally:
        cable.remove()


def start_ranks(config: Path, cable: Cable) -> list[subprocess.Popen[str]]:
    """Each rank in its namespace, as torchrun would start it on its host."""
    found = []
    for rank, host in enumerate(cable.hosts):
        here = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment = {
            **os.environ,
            **here,
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": "29555",
            "GLOO_SOCKET_IFNAME": "cable",
            "OMP_NUM_THREADS": "1",
        }
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "regrowth", "train", str(config)]
        found.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return found


@pytest.fixture(scope="module")
def undisturbed_long(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of the run whose cable nobody touched, and which had none."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert regrowth("train", configured(folder, corpus, **LONG)).returncode == 0
    return numbers(only_run(folder))


def ended(ranks: list[subprocess.Popen[str]]) -> list[str]:
    """What the ranks have said in the end."""
    try:
        return [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.parametrize("amid", ["steps", "a checkpoint"])
def test_ranks_whose_network_drops_name_each_other_and_the_run_goes_on(
    amid: str, cable: Cable, undisturbed_long: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    ranks = start_ranks(configured(tmp_path, corpus, **LONG), cable)
    try:
        wait_for(lambda: steps_done(tmp_path) > 50, ranks[0])
        if amid == "a checkpoint":
            wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/.step-*.partial")), ranks[0])
        cable.switch("down")
    finally:
        told = ended(ranks)
    run = only_run(tmp_path)
    assert [rank.returncode for rank in ranks] == [1, 1], told
    for rank, output in enumerate(told):
        letter = one_letter(output)
        assert f"rank {rank} (step " in letter and f"waited in vain for rank {1 - rank} on " in letter, letter
    assert run.checkpointed >= 40 and not run.finished
    again = regrowth("train", "--resume", run.path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert numbers(run) == undisturbed_long


@pytest.mark.slow
def test_a_network_that_drops_for_a_second_changes_nothing(
    cable: Cable, undisturbed_long: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    ranks = start_ranks(configured(tmp_path, corpus, **LONG), cable)
    try:
        wait_for(lambda: steps_done(tmp_path) > 50, ranks[0])
        cable.switch("down")
        before = steps_done(tmp_path)
        time.sleep(1.0)
        assert steps_done(tmp_path) <= before + 1, "they did not talk over the cable"
        cable.switch("up")
    finally:
        told = ended(ranks)
    run = only_run(tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert numbers(run) == undisturbed_long
    assert not [event for event in run.rows("events") if event["event"] in ("failed", "resumed")]


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(UserError, match=f"MASTER_PORT={port}: another process .* Give all ranks another port"),
            process_group(torch.device("cpu")),
        ):
            pass
