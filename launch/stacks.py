"""What a process that hangs is doing, as others see it: the kernel's word, and the stacks of its native code."""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_NATIVE_SECONDS = 20.0


def py_spy() -> str | None:
    """The program, beside this Python or on the path."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def note_all(logs: dict[int, Path]) -> list[str]:
    """`note_stacks` of several processes at once, by pid; their states in the same order."""
    with ThreadPoolExecutor(max(1, len(logs))) as threads:
        return list(threads.map(note_stacks, logs.keys(), logs.values()))


def note_stacks(pid: int, log: Path) -> str:
    """Add to a rank's log what Linux tells of its process, and, where py-spy is installed and may look, the stacks of its threads with native code.

    Returns:
        The process's state, as Linux has it: a letter and a word in brackets; empty if it is gone.
    """
    state, told = "", [f"-- found hanging at {time.strftime('%Y-%m-%d %H:%M:%S %z')}"]
    for name in ("status", "wchan", "syscall", "stack"):
        with suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text().strip()
            if name == "status":
                text = next(line for line in text.splitlines() if line.startswith("State")).split("\t")[-1]
                state = text
            told.append(f"{name}: {text}")
    if (program := py_spy()) and state:
        try:
            done = subprocess.run(
                [program, "dump", "--native", "--pid", str(pid)], capture_output=True, text=True, errors="replace", timeout=_NATIVE_SECONDS
            )
            told.append(f"py-spy: {done.stdout.strip() or done.stderr.strip()}")
        except (OSError, subprocess.TimeoutExpired) as error:
            told.append(f"py-spy: {error}")
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write("\n".join(told) + "\n")
    return state
