"""Described machines: what `launch slurm --cluster` asks Slurm for there, and what it refuses."""

from pathlib import Path

import pytest

from regrowth.parallel.cluster import clusters, load_cluster
from tests.launch.helpers import call, one_letter

MACHINE = """
name = "ours"
device = "gpu"
devices_per_node = 4
memory_gib = 40.0
sustained_tflops = 100.0
efficiency = 0.5
link_gbytes_per_second = 50.0
network_gbytes_per_second = 5.0
[slurm]
partition = "batch"
account = "lab"
minutes = 90
gpus_per_node = 4
setup = ["module load rocm", "export A=1"]
max_minutes = 120
max_nodes = 2
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "ours.toml").write_text(MACHINE)
    return tmp_path / "ours.toml"


Streams = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch]


@pytest.fixture
def streams(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Streams:
    return capsys, monkeypatch


def printed(streams: Streams, *arguments: str | Path) -> tuple[int, str]:
    return call(*streams, "launch", "slurm", "quickstart", *arguments, "--print")


def test_a_description_gives_the_defaults(machine: Path, streams: Streams) -> None:
    code, script = printed(streams, "--cluster", machine, "parallel.dp_shard=8", "parallel.micro_batch=1", "loader.global_batch=32")
    assert code == 0, script
    lines = script.splitlines()
    for option in ("partition=batch", "account=lab", "time=90", "gpus-per-node=4", "nodes=2"):
        assert f"#SBATCH --{option}" in lines
    assert lines.index("module load rocm") + 1 == lines.index("export A=1") < next(i for i, line in enumerate(lines) if "srun" in line)
    assert "--nproc-per-node=4" in script and '"max_nodes": 2' in script


def test_options_win_over_the_description(machine: Path, streams: Streams) -> None:
    options = ["--partition", "debug", "--account", "mine", "--minutes", "120", "--gpus-per-node", "1", "--setup", "true", "--nodes", "2"]
    code, script = printed(streams, "--cluster", machine, *options)
    for option in ("partition=debug", "account=mine", "time=120", "gpus-per-node=1", "nodes=2"):
        assert f"#SBATCH --{option}" in script.splitlines(), script
    assert code == 0 and "module load" not in script and "\ntrue\n" in script


def test_without_a_description_the_defaults_are_the_old_ones(streams: Streams) -> None:
    code, script = printed(streams)
    assert code == 0 and "--time=60" in script and "--nodes=1" in script and "gpus-per-node" not in script


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--minutes", "121"], "--minutes 121: --cluster {} allows slurm.max_minutes = 120. Ask for --minutes 120 or less"),
        (["--gpus-per-node", "5"], "--gpus-per-node 5: nodes of --cluster {} have slurm.gpus_per_node = 4. Ask for at most 4"),
        (["parallel.dp_shard=16", "loader.global_batch=64"], "--nodes 4: the machine's description allows slurm.max_nodes = 2."),
        (["--nodes", "1", "parallel.dp_shard=8"], "--gpus-per-node 4: 8 ranks come to each of 1 nodes, and each rank needs a GPU."),
        (["--ranks-per-node", "8"], "devices_per_node = 4; a rank needs one of its own. Choose 4 or less."),
    ],
)
def test_more_than_the_description_allows_is_refused(options: list[str], told: str, machine: Path, streams: Streams) -> None:
    code, output = printed(streams, "--cluster", machine, *options)
    assert code == 2 and told.format(machine) in one_letter(output)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("partition", "partitoin", 'unknown key "slurm.partitoin"; did you mean "partition"?'),
        ("minutes = 90", "minutes = 0", "slurm.minutes = 0: input should be greater than or equal to 1"),
        ("minutes = 90", "minutes = 900", "slurm.minutes = 900 is more than slurm.max_minutes = 120"),
        ('setup = ["module load rocm", "export A=1"]', 'setup = "module load rocm"', "slurm.setup = 'module load rocm': input should be a valid list"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_told_by_key(before: str, after: str, told: str, machine: Path, streams: Streams) -> None:
    machine.write_text(MACHINE.replace(before, after, 1))
    code, output = printed(streams, "--cluster", machine)
    assert code == 2 and told in one_letter(output) and str(machine) in output


def test_a_machine_that_is_not_described_is_told_with_the_nearest(streams: Streams) -> None:
    code, output = printed(streams, "--cluster", "frontiers")
    assert code == 2 and 'did you mean "frontier"?' in one_letter(output)


@pytest.mark.parametrize("name", ["laptop", "h100_node", "frontier", "cpu_cluster"])
def test_shipped_machines_are_planned_for_and_submitted_to(name: str, streams: Streams) -> None:
    described = load_cluster(clusters()[name])
    assert described.name == name and described.slurm.gpus_per_node in (None, 0, described.devices_per_node)
    code, output = call(*streams, "plan", "quickstart", "--cluster", name)
    assert code == 0 and f"on {name} ({described.device})" in output
    code, script = printed(streams, "--cluster", name)
    assert code == 0 and "#SBATCH --nodes=1" in script
