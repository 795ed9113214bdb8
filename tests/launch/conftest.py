"""A real Slurm of virtual nodes on this host, where its daemons are installed."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CLUSTER = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")).parent / "tools" / "slurm_cluster.sh"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if not CLUSTER.exists() or not all(shutil.which(c) for c in ("slurmctld", "slurmd", "munged", "sbatch")) or os.geteuid() != 0:
        pytest.skip(f"a real Slurm needs slurmctld, slurmd and munge, root, and {CLUSTER}")
    folder = Path(f"/tmp/slurm-test-{os.getpid()}")
    monkeypatch.setenv("SLURM_CI_DIR", str(folder))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PORT", "17900")
    subprocess.run(["bash", str(CLUSTER), "up"], check=True, timeout=60)
    yield folder
    subprocess.run(["bash", str(CLUSTER), "down"], timeout=60)
    shutil.rmtree(folder, ignore_errors=True)
