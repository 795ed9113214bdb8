"""A job that goes on at once on other nodes of its own when one fails: spare ones, or fewer with fewer data-parallel ranks."""

import os
import subprocess
import time
from pathlib import Path

from regrowth.errors import RunFailed, UserError
from regrowth.launch.local import final_letter
from regrowth.launch.supervise import KNOWN_ENDS, cancelled, note_loss
from regrowth.pretrain.run_folder import RunFolder


def hosts(count: int) -> str:
    """The nodes that the next start of this job's ranks goes to, comma-separated; fewer than `count` only with `supervision.elastic`.

    Raises:
        UserError: this is no such job.
        RunFailed: too few nodes are left, or what ended the last start was not a node that failed: no other nodes mend it.
    """
    if "REGROWTH_JOB_NOTE" not in os.environ or "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError("launch hosts: this is for the script of a Slurm job.")
    note = Path(os.environ["REGROWTH_JOB_NOTE"])
    nodes = _nodes()
    up = [name for name, state in nodes.items() if not state.endswith("*") and not state.startswith(("down", "drain", "fail"))]
    failed = sorted(set(nodes) - set(up))
    known = note.with_suffix(".failed-nodes")
    run = None
    if os.environ.get("REGROWTH_START", "0") != "0":
        run = RunFolder.open(Path(note.read_text(encoding="utf-8"))) if note.exists() else None
        if run is None or run.finished or run.replanned or run.ended_by("stopped") or cancelled(run) or final_letter(run.path):
            raise RunFailed("the ranks are not started again in this job.")
        if not (more := [name for name in failed if name not in known.read_text(encoding="utf-8").split()]):
            raise RunFailed(f"{run.path}: the ranks ended, and no further node has failed; not started again on others.")
        if not run.ended_by(*KNOWN_ENDS):
            note_loss(run, f"{run.path}: node {', '.join(more)} failed; going on without it")
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(" ".join(failed), encoding="utf-8")
    if 0 < len(up) < count and run and (fewer := _fewer(run, count, len(up))):
        run.log("events", {"event": "fewer replicas", "time": time.time(), "nodes": fewer, "of": count})
        count = fewer
    if len(up) < count:
        raise RunFailed(f"{len(up)} of this job's nodes are left ({', '.join(failed)} failed); the run needs {count}.")
    return ",".join(up[:count])


def _fewer(run: RunFolder, count: int, left: int) -> int:
    """On how many of the nodes that are left the run can go on with fewer data-parallel ranks; 0 if it cannot, or is not to."""
    config = run.config()
    ranks_per_node = config.parallel.world_size // count
    plan = config.parallel
    while config.supervision.elastic and (fewer := config.with_fewer_replicas(min(left * ranks_per_node, plan.world_size - 1))):
        plan = fewer.parallel
        if plan.world_size % ranks_per_node == 0:
            return plan.world_size // ranks_per_node
    return 0


def _nodes() -> dict[str, str]:
    """The states of this job's nodes, in their order."""
    try:
        told = subprocess.run(["sinfo", "-h", "-N", "-n", os.environ["SLURM_JOB_NODELIST"], "-o", "%N %T"], capture_output=True, text=True,
                              timeout=60, check=True).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"sinfo does not tell how this job's nodes are ({error}).") from error
    return dict(line.split() for line in told.splitlines())
