"""The doctor of a cluster: nodes that are ill, differ, or do not answer are named; arithmetic and disks that lie are found."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from regrowth.launch.cluster_doctor import compare
from regrowth.launch.doctor import Finding
from regrowth.parallel import health
from tests.launch.helpers import call
from tests.slurm_cluster import SlurmCluster


def answer(node: str, *rows: Finding, skew: float = 0.01) -> dict[str, Any]:
    return {"node": node, "host": "h", "skew": skew, "findings": [asdict(row) for row in rows], "error": "no such file"}


def test_nodes_that_differ_are_named() -> None:
    good, other = Finding("torch", "ok", "2.13"), Finding("torch", "ok", "2.11")
    ill = Finding("disk speed here", "fault", "read-only", "use another disk")
    found = compare([answer("n1", good), answer("n2", other), answer("n3", good, ill), answer("n4", good, skew=-40.0)], 5)
    assert [(f.check, f.found) for f in found] == [
        ("nodes", "4 of 5 answered"),
        ("n3: disk speed here", "read-only"),
        ("n2: torch", "2.11; 3 nodes have 2.13"),
        ("n4: clock", "40 s behind this host's"),
    ]
    assert all(f.level == "fault" and f.remedy for f in found)
    assert compare([answer("n1", good), answer("n2", good)], 2) == []
    broken = {**answer("n1"), "findings": None}
    assert [(f.check, f.found) for f in compare([broken], 1)] == [("n1", "the doctor did not run: no such file")]


@pytest.mark.slow
def test_the_nodes_of_a_real_slurm_are_asked(
    cluster: SlurmCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = call(capsys, monkeypatch, "doctor", "--cluster", "--nodes", "2")
    assert code == 0 and "2 of 2 nodes answered" in output, output
    code, output = call(capsys, monkeypatch, "doctor", "--cluster", "--partition", "nowhere")
    assert code == 2 and "no node answered" in output and "partition" in output, output


def test_wrong_arithmetic_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert health.arithmetic_faults(cpu) == []
    right = torch.Tensor.__matmul__

    def flipped(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        found = right(left, other)
        if found.dtype == torch.bfloat16:
            found[3, 5] += 1024
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", flipped)
    (fault,) = health.arithmetic_faults(cpu)
    assert "torch.bfloat16 is wrong on cpu in 1 of 65536 places" in fault


def test_a_disk_that_cannot_be_written_or_lies_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, read, faults = health.disk_speed(tmp_path)
    assert written > 0 and read > 0 and faults == [] and not list(tmp_path.iterdir())
    assert "cannot be written" in health.disk_speed(tmp_path / "nowhere")[2][0]
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"other")
    assert "not what is read back" in health.disk_speed(tmp_path)[2][0]
