"""A real Slurm for tests: its own daemons with virtual nodes on this host, on loopback, in a folder of its own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

_DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")

# Credentials expire after 5 s, so that a job that is requeued waits seconds and not minutes; a node that says nothing for 20 s is down.
_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmdPort={next_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdTimeout=20
KillWait=10
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=2 RealMemory=4000
PartitionName=ci Nodes={nodes} Default=YES MaxTime=60 DefaultTime=5
"""


class SlurmCluster:
    """Nodes n1 to n4. Clients find it by SLURM_CONF; they hang when the controller is down, so each needs a time limit."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        port = 11000 + os.getpid() % 400 * 20  # below those of clients; two test runs on one host do not meet
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self.conf = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir(exist_ok=True)
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(
            _CONF.format(host=host, folder=folder, port=port, next_port=port + 2, nodes=f"n[1-{nodes}]", first_port=port + 11,
                         last_port=port + 10 + nodes)
        )  # fmt: skip
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)

    @staticmethod
    def missing() -> str:
        """Why there can be none here; empty if there can."""
        absent = [name for name in _DAEMONS if not shutil.which(name)]
        if absent:
            return f"a real Slurm needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins)"
        return "" if os.geteuid() == 0 else "a real Slurm needs root here"

    def up(self) -> None:
        """Start all daemons; return when every node is idle."""
        paths = {
            "socket": "munge.sock",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        self._daemon("munged", "--force", *(f"--{name}={self.folder / file}" for name, file in paths.items()))
        self.start_controller()
        for node in self.nodes:
            self._daemon("slurmd", "-N", node)
        until = time.monotonic() + 60
        while self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() != str(len(self.nodes)):
            if time.monotonic() > until:
                raise AssertionError(f"the nodes are not idle: {(self.folder / 'slurmctld.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def down(self) -> None:
        """Cancel what is left, and end all daemons that were started."""
        until = time.monotonic() + 30
        while self.ask("squeue", "-h") and time.monotonic() < until:
            self.ask("scancel", "-u", "root")
            time.sleep(0.5)
        for pid_file in self.folder.glob("*.pid"):  # nothing of theirs is worth keeping
            self._end(pid_file)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_controller(self) -> None:
        """After `kill_controller`, or first."""
        self._daemon("slurmctld")

    def kill_controller(self) -> None:
        """Without a word, as a host that loses power."""
        self._end(self.folder / "slurmctld.pid")

    def kill_node(self, node: str) -> None:
        """A node's daemon dies without a word, and with it what it started there."""
        steps = subprocess.run(["pgrep", "-f", "slurmstepd"], capture_output=True, text=True).stdout.split()
        self._end(self.folder / f"slurmd-{node}.pid")
        for step in map(int, steps):
            below = _below(step)
            if any({f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.conf}"} <= set(_environment(pid)) for pid in below):
                for pid in (step, *below):
                    _kill(pid)

    def ask(self, *command: str) -> str:
        """What a client says; empty if it does not answer in time."""
        try:
            return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=10).stdout
        except subprocess.TimeoutExpired:
            return ""

    def _daemon(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=60, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)  # fmt: skip

    def _end(self, pid_file: Path) -> None:
        with suppress(OSError, ValueError):
            _kill(int(pid_file.read_text()))
            pid_file.unlink()


def _below(pid: int) -> list[int]:
    """All descendants of a process."""
    found, waiting = [], [pid]
    while waiting:
        children = subprocess.run(["pgrep", "-P", str(waiting.pop())], capture_output=True, text=True).stdout.split()
        found += map(int, children)
        waiting += map(int, children)
    return found


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
