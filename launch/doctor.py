"""Is this machine ready? Each check says what it found and, where something is wrong, the remedy."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from regrowth.errors import install_command

_DISK_BYTES = 16 << 20  # enough to tell a disk's speed from its latency


@dataclass(frozen=True)
class Finding:
    """One check. `level` is ok, note (something optional is missing) or fault."""

    check: str
    level: str
    found: str
    remedy: str = ""


def doctor(as_json: bool) -> int:
    """Run all checks, print them; returns 0, or 1 if there is a fault."""
    findings = [
        *_interpreter(),
        *_packages(),
        *_devices(),
        *_health(),
        *_space(),
        *_limits(),
        *_commands(),
        _name_clash(),
        _two_processes(),
    ]
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        show(findings)
    return int(any(f.level == "fault" for f in findings))


def show(findings: list[Finding]) -> None:
    """Print a table of them."""
    table = Table("check", "", "found", "remedy")
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "fault": "[red]fault[/red]"}
    for f in findings:
        table.add_row(escape(f.check), marks[f.level], escape(f.found), escape(f.remedy))
    Console().print(table)


def _interpreter() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    return [Finding("python", "ok" if good else "fault", platform.python_version(), "" if good else "Python 3.11 or newer is needed")]


def _packages() -> list[Finding]:
    findings = []
    # The packages the project is built around, then those that some commands need.
    for package, module in (("torch", "torch"), ("datasets", "datasets"), ("pyarrow", "pyarrow"), ("fasttext", "fasttext"), ("mpi4py", "mpi4py"),
                            ("deepspeed", "deepspeed"), ("megatron-core", "megatron"), ("transformers", "transformers"), ("lm_eval", "lm_eval"),
                            ("triton", "triton"), ("torchao", "torchao"), ("numba", "numba"), ("fastwarc", "fastwarc"),
                            ("resiliparse", "resiliparse"), ("fastokens", "fastokens")):  # fmt: skip
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            level = "fault" if install_command(module) == "pip install -e ." else "note"
            findings.append(Finding(package, level, "not installed", install_command(module)))
            continue
        if package == "torch" and not (2, 11) <= tuple(int(x) for x in version.split("+")[0].split(".")[:2]) <= (2, 13):
            findings.append(Finding("torch", "fault", version, "torch 2.11 to 2.13 is supported"))
        else:
            findings.append(Finding(package, "ok", version))
    return findings


def _devices() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [Finding("cpu", "ok", f"{cores} cores, {torch.get_num_threads()} torch threads")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            findings.append(Finding(f"gpu {i}", "ok", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}"))
    else:
        findings.append(Finding("gpu", "note", "none that torch can use", "runs go to the CPU; for a GPU install a CUDA build of torch"))
    return findings


def _space() -> list[Finding]:
    findings = []
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", Path(os.environ.get("TMPDIR", "/tmp")))):
        try:
            free = shutil.disk_usage(folder).free / 2**30
        except OSError as error:
            findings.append(Finding(name, "fault", f"{folder}: {error.strerror}", "set TMPDIR to a folder that exists"))
            continue
        writable = os.access(folder, os.W_OK)
        level = "fault" if not writable else "note" if free < 2 else "ok"
        remedy = "not writable" if not writable else "the quickstart needs about 1 GiB" if free < 2 else ""
        findings.append(Finding(name, level, f"{free:.1f} GiB free in {folder}", remedy))
    return findings


def _health() -> list[Finding]:
    """What a run looks at before it starts, with figures."""
    import torch

    from regrowth.parallel.health import device_faults, disk_speed

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    faults = [fault for device in devices for fault in device_faults(device)]
    findings = [Finding("devices", "fault" if faults else "ok", "; ".join(faults) or "memory is free, and products of matrices are exact on each",
                        "take this node out" if faults else "")]  # fmt: skip
    written, read, wrong = disk_speed(Path.cwd(), _DISK_BYTES)
    speeds = f"{written:.0f} MB/s written and synced, {read:.0f} MB/s read"
    findings.append(Finding("disk speed here", "fault" if wrong else "ok", "; ".join(wrong) or speeds, "use another disk" if wrong else ""))
    return findings


def _limits() -> list[Finding]:
    """Limits of this shell that a run of many ranks and files meets."""
    import resource

    findings = []
    for name, kind, least, why in (
        ("open files", resource.RLIMIT_NOFILE, 4096, "shards, sockets and logs: ulimit -n 65536"),
        ("processes", resource.RLIMIT_NPROC, 1024, "ranks, loaders and their threads: ulimit -u unlimited"),
        ("locked memory", resource.RLIMIT_MEMLOCK, 1 << 30, "pinned memory and InfiniBand: ulimit -l unlimited"),
    ):
        limit = resource.getrlimit(kind)[0]
        enough = limit in (resource.RLIM_INFINITY, -1) or limit >= least
        told = "unlimited" if limit in (resource.RLIM_INFINITY, -1) else f"{limit:,}"
        findings.append(Finding(f"limit of {name}", "ok" if enough else "note", told, "" if enough else why))
    return findings


def _commands() -> list[Finding]:
    """Slurm, MPI, the driver and NCCL: versions, as they say them."""
    import torch

    findings = []
    for check, command, needed in (
        ("slurm", ["scontrol", "--version"], "only needed for `regrowth launch slurm`"),
        (
            "mpi",
            [sys.executable, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())"],
            "only needed for ranks that mpirun starts: pip install -e '.[mpi]'",
        ),
        ("gpu driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], "only needed for NVIDIA GPUs"),
    ):
        told = _first_line(command)
        findings.append(Finding(check, "ok" if told else "note", told or f"no answer from {Path(command[0]).name}", "" if told else needed))
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        from torch.cuda import nccl

        findings.append(Finding("nccl", "ok", ".".join(map(str, nccl.version()))))
    return findings


def _first_line(command: list[str]) -> str:
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else ""


def _name_clash() -> Finding:
    """The folders at the top of the repository must not be importable by their bare names, where they could shadow other packages."""
    here = Path(__file__).resolve().parents[1]
    if clashes := [n for n in ("kernels", "launch", "parallel", "pretrain", "configs", "data_pipeline") if _found_here(n, here)]:
        return Finding(
            "clean names",
            "note",
            f"importable here: {', '.join(clashes)}",
            "run from another folder, or without the repository on PYTHONPATH",
        )
    return Finding("clean names", "ok", "only `regrowth` is importable")


def _found_here(name: str, here: Path) -> bool:
    spec = util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return any(Path(place).resolve().parent == here for place in places)


_PROBE = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
x = torch.ones(4); dist.all_reduce(x); assert x.sum() == 8
dist.destroy_process_group()
"""


def _two_processes() -> Finding:
    """Two processes join with gloo and add a tensor."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        ranks = [
            subprocess.Popen([sys.executable, "-W", "ignore", "-c", _PROBE, store, str(rank)], stderr=subprocess.PIPE) for rank in (0, 1)
        ]
        try:
            errors = [rank.communicate(timeout=60)[1].decode(errors="replace") for rank in ranks]
        except subprocess.TimeoutExpired:
            for rank in ranks:
                rank.kill()
            return Finding(
                "two processes (gloo)",
                "fault",
                "no answer within 60 s",
                "set GLOO_SOCKET_IFNAME to a network interface that works, e.g. lo",
            )
    if any(rank.returncode for rank in ranks):
        last = next((e.strip().splitlines()[-1] for e in errors if e.strip()), "failed")
        return Finding("two processes (gloo)", "fault", last, "set GLOO_SOCKET_IFNAME to a network interface that works, e.g. lo")
    return Finding("two processes (gloo)", "ok", "joined and added a tensor")
