"""A growth that changes the number of ranks, with real processes."""

from pathlib import Path

import pytest

from tests.launch.helpers import only_run, regrowth, write_config


@pytest.mark.slow
def test_the_launcher_starts_the_ranks_that_the_grown_model_needs(documents: Path, tmp_path: Path) -> None:
    growth = [{"at_step": 2, "operators": [{"op": "stack"}], "parallel": {"dp_shard": 2}}]
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 4}, growth=growth)
    done = regrowth("train", config)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert run.finished and [row["layers"] for row in run.rows("metrics")] == [2, 2, 4, 4]
    assert [event["ranks"] for event in run.rows("events") if event["event"] == "replanned"] == [2]
    assert (run.path / "logs/rank-1.log").exists() and "step-000004" in {path.name for path in (run.path / "checkpoints").iterdir()}


@pytest.mark.parametrize(("ranks_per_node", "nodes"), [(8, 1), (2, 2), (3, 2), (1, 4)])
def test_a_job_has_as_many_nodes_as_the_plan_needs(ranks_per_node: int, nodes: int, documents: Path, tmp_path: Path) -> None:
    from regrowth.launch.slurm import JobOptions, render

    config = write_config(tmp_path / "c.toml", documents, tmp_path, parallel={"dp_shard": 4, "micro_batch": 2})
    text, _ = render(str(config), [], JobOptions(ranks_per_node=ranks_per_node))
    assert f"--nodes={nodes}" in text and f"--nproc-per-node={4 // nodes}" in text
