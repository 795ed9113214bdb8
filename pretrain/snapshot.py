"""What a run was made with, written into its folder: code, versions, devices. `environment.json` and `code.patch` are those of the newest start.

Of environment variables only those are kept that steer how ranks compute and talk, and none whose name or value looks like a secret or a path.
"""

import os
import platform
import re
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from regrowth import __version__
from regrowth.errors import RunFailed, UserError
from regrowth.files import read_json, write_json
from regrowth.pretrain.code_state import CodeState, code_state, told

_PACKAGES = ("torch", "numpy", "pyarrow", "tokenizers", "safetensors", "transformers", "datasets", "pydantic")
_OPTIONAL = ("triton", "torchao", "deepspeed", "megatron-core", "mpi4py", "numba", "fsspec")
_VARIABLES = re.compile(
    r"(NCCL|RCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|OMP|MKL|FI)_\w+|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|CUDA_DEVICE_MAX_CONNECTIONS"
    r"|SLURM_(JOB_ID|RESTART_COUNT|JOB_NUM_NODES|NTASKS|STEP_NUM_TASKS)|(WORLD|LOCAL_WORLD)_SIZE"
)
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|SIGNATURE", re.IGNORECASE)
_PLAIN_VALUE = re.compile(r"[\w.,:=^+* -]{0,100}")
_TOKEN = re.compile(r"\b(hf|ghp|gho|glpat|sk|pk|xox\w|eyJ\w*|AKIA\w*)[-_.]\w+|AKIA\w{8,}|eyJ\w{8,}|(?=[A-Za-z_]*\d)\w{20,}")
_NOT_KEPT = "(set)"


def environment() -> dict[str, Any]:
    """Machine and versions, for the report; no user name, no host name."""
    versions = {name: version for name in (*_PACKAGES, *_OPTIONAL) if (version := _version(name)) or name in _PACKAGES}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "regrowth": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "packages": {name: version or "not installed" for name, version in versions.items()},
        "variables": variables(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def variables() -> dict[str, str]:
    """The environment variables that are worth keeping; where a value may be a secret or a path, only that there is one."""
    kept = {}
    for name, value in sorted(os.environ.items()):
        if _VARIABLES.fullmatch(name) and not _SECRET_NAME.search(name):
            kept[name] = value if _PLAIN_VALUE.fullmatch(value) and not _TOKEN.search(value) else _NOT_KEPT
    return kept


def write_snapshot(folder: Path, **more: Any) -> None:
    """Of a new run."""
    _write(folder, code_state(), {}, more)


def note_start(folder: Path, **more: Any) -> dict[str, Any] | None:
    """Bring the snapshot up to this start.

    Args:
        more: what only ranks know: their device, and how many they are.

    Returns:
        The event of a run whose code has changed; its patch before is kept beside the new one.
    """
    known = _known(folder)
    state, before = code_state(), known.get("code") or {}
    event = None
    if state and before and state.facts() != before:
        event = {"event": "code changed", "time": time.time(), "from": told(before), "to": told(state.facts())}
        if kept := _set_aside(folder):
            event["patch_before"] = kept
    elif known.get("regrowth", __version__) != __version__:
        event = {"event": "code changed", "time": time.time(), "from": f"version {known['regrowth']}", "to": f"version {__version__}"}
    _write(folder, state, before, more)
    return event


def _known(folder: Path) -> dict[str, Any]:
    try:
        return dict(read_json(folder / "environment.json"))
    except (UserError, OSError, ValueError, TypeError):  # none yet, or not whole: it is written anew
        return {}


def _write(folder: Path, state: CodeState | None, before: dict[str, Any], more: dict[str, Any]) -> None:
    facts = environment() | more | {"code": state.facts() if state else before or None}
    with suppress(OSError, RunFailed):  # it explains the run, which goes on without it
        if state and state.dirty:
            patch = folder / "code.patch"
            patch.touch(mode=0o600)  # its owner's alone, also where the folder is opened to others
            patch.write_bytes(state.text())
        if facts != _known(folder):
            write_json(folder / "environment.json", facts)


def _set_aside(folder: Path) -> str | None:
    """Keep the patch of the code before under a name of its own."""
    patch = folder / "code.patch"
    names = (folder / f"code-{number}.patch" for number in range(1, 10_000))
    with suppress(OSError, StopIteration):
        free = next(path for path in names if not path.exists())
        patch.rename(free)
        return free.name
    return None
