"""Are a cluster's nodes ready, and alike? Every node checks itself; then their versions and clocks are compared."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console

from regrowth.errors import UserError
from regrowth.launch.doctor import Finding, show

_PATIENCE = 600  # seconds until all nodes have answered, waiting for the allocation included
_SKEW_SECONDS = 5.0  # that clocks may differ: logs of all nodes are merged by time
# On each node: its own findings, with its name and its clock, as one line.
_PROBE = """
import json, socket, subprocess, sys, time
done = subprocess.run([sys.executable, "-m", "regrowth", "doctor", "--json"], capture_output=True, text=True)
try:  # short, for lines of many nodes come through one pipe
    rows = [row for row in json.loads(done.stdout) if row["level"] == "fault" or row["check"] in sys.argv[1].split(",")]
except ValueError:
    rows = None
print(json.dumps({"host": socket.gethostname(), "node": __import__("os").environ.get("SLURMD_NODENAME", ""), "clock": time.time(),
                  "findings": rows, "error": done.stderr[-200:]}), flush=True)
"""
_ALIKE = ("python", "torch", "nccl", "gpu driver", "gpu 0")


def cluster_doctor(as_json: bool, nodes: int, partition: str | None) -> int:
    """The `doctor --cluster` command; returns 0, or 1 if there is a fault.

    Raises:
        UserError: there is no Slurm here, or no node answers.
    """
    if not shutil.which("srun"):
        raise UserError("doctor --cluster: no srun on this machine. Run it on the cluster's login node or in a job.")
    count = nodes or int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", *([f"--partition={partition}"] if partition else []),
               sys.executable, "-c", _PROBE, ",".join(_ALIKE)]  # fmt: skip
    answers, errors = _ask(command)
    if not answers:
        raise UserError(f"doctor --cluster: no node answered: {errors or f'not within {_PATIENCE} s; are {count} free? sinfo tells'}")
    findings = compare(answers, count)
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        show(findings)
        Console().print(f"{len(answers)} of {count} nodes answered. What is fine on every node and the same is not shown.")
    return int(any(f.level == "fault" for f in findings))


def _ask(command: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What each node says, with how far its clock is from this one's, and what Slurm complains of."""
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as complaints:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
        patience = threading.Timer(_PATIENCE, asked.kill)
        patience.start()
        try:
            assert asked.stdout
            for line in asked.stdout:  # each as soon as it is there: its clock was read a moment before
                with suppress(ValueError, KeyError, TypeError):  # what else nodes print
                    answer = json.loads(line)
                    answers.append({**answer, "skew": answer["clock"] - time.time()})
            asked.wait()
        finally:
            patience.cancel()
            asked.kill()
        complaints.seek(0)
        return answers, complaints.read().strip()[-500:]


def compare(answers: list[dict[str, Any]], expected: int) -> list[Finding]:
    """What is wrong on a node, and where nodes differ from most of the others.

    Args:
        answers: of the nodes: node, host, skew (seconds by which its clock is ahead of this host's), findings.
        expected: how many nodes were asked.
    """
    found: list[Finding] = []
    if len(answers) < expected:
        found.append(Finding("nodes", "fault", f"{len(answers)} of {expected} answered", "sinfo -R tells why nodes are down"))
    values: dict[str, dict[str, str]] = {}
    for answer in answers:
        node = answer["node"] or answer["host"]
        if answer["findings"] is None:
            found.append(
                Finding(node, "fault", f"the doctor did not run: {answer['error'].strip()}", "install regrowth where every node sees it")
            )
            continue
        rows = [Finding(**row) for row in answer["findings"]]
        found += [Finding(f"{node}: {row.check}", row.level, row.found, row.remedy) for row in rows if row.level == "fault"]
        for row in rows:
            if row.check in _ALIKE:
                values.setdefault(row.check, {})[node] = row.found
    for check, by_node in values.items():
        (usual, most), *others = Counter(by_node.values()).most_common()
        for node, value in by_node.items():
            if others and value != usual:
                found.append(Finding(f"{node}: {check}", "fault", f"{value}; {most} nodes have {usual}", "bring all nodes to one state"))
    for answer in answers:
        if abs(answer["skew"]) > _SKEW_SECONDS:
            told = f"{abs(answer['skew']):.0f} s {'ahead of' if answer['skew'] > 0 else 'behind'} this host's"
            found.append(
                Finding(f"{answer['node'] or answer['host']}: clock", "fault", told, "start a time service (chrony) on every node")
            )
    return found
