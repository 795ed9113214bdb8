"""A job that has more nodes than its run needs: when one fails, the run goes on at once on those that are left."""

import os
import subprocess
from pathlib import Path

from regrowth.errors import RunFailed, UserError
from regrowth.launch.local import final_letter
from regrowth.launch.supervise import KNOWN_ENDS, cancelled, note_loss
from regrowth.pretrain.run_folder import RunFolder


def hosts(count: int) -> str:
    """The nodes that the next start of this job's ranks goes to, comma-separated.

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
    if len(up) < count:
        raise RunFailed(f"{len(up)} of this job's nodes are left ({', '.join(failed)} failed); the run needs {count}.")
    return ",".join(up[:count])


def _nodes() -> dict[str, str]:
    """The states of this job's nodes, in their order."""
    try:
        told = subprocess.run(["sinfo", "-h", "-N", "-n", os.environ["SLURM_JOB_NODELIST"], "-o", "%N %T"], capture_output=True, text=True,
                              timeout=60, check=True).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"sinfo does not tell how this job's nodes are ({error}).") from error
    return dict(line.split() for line in told.splitlines())
