"""Which code a run is made with: the commit that this package lies in, and what was changed since.

Git is asked for it where the package's own files are tracked; a package that was installed elsewhere has its version alone. Git that is missing,
slow or broken only means that nothing is known.
"""

import hashlib
import os
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regrowth

_MOST_BYTES = 1_000_000  # of a patch that is kept
_MOST_NAMES = 100
_SECONDS = 10.0  # for one answer: file systems of clusters can be slow
_PACKAGE = Path(regrowth.__file__).resolve()


@dataclass(frozen=True)
class CodeState:
    """A commit, and what the work tree has besides."""

    commit: str
    patch: bytes = b""  # against the commit, cut at a size
    cut: bool = False
    untracked: list[str] = field(default_factory=list)  # Python files that git does not know

    @property
    def dirty(self) -> bool:
        """Whether the code is not the commit's."""
        return bool(self.patch or self.untracked)

    def facts(self) -> dict[str, Any]:
        """What is written down of it beside the patch."""
        told = {"commit": self.commit, "dirty": self.dirty}
        if self.dirty:
            told |= {"patch_sha256": hashlib.sha256(self.text()).hexdigest(), "patch_cut": self.cut, "untracked": self.untracked}
        return told

    def text(self) -> bytes:
        """The patch as a file: `git apply` skips what stands in front of it."""
        lines = [f"Uncommitted changes on {self.commit}.", *(f"Not in git, and not in here: {name}" for name in self.untracked)]
        if self.cut:
            lines.append(f"The patch is cut after {len(self.patch):,} bytes.")
        return "\n".join([*lines, "", ""]).encode() + self.patch


def code_state(package: Path = _PACKAGE) -> CodeState | None:
    """The state of the work tree that holds a package; None if it is in none, or git does not say.

    Args:
        package: its `__init__.py`.
    """
    root = package.parents[1]
    tracked = _git(root, "ls-files", "--error-unmatch", str(package))
    commit = _git(root, "rev-parse", "HEAD") if tracked else None
    patch = _git(root, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", ".") if commit else None
    others = _git(root, "ls-files", "--others", "--exclude-standard", "--", "*.py") if commit else None
    if commit is None or patch is None or others is None:
        return None
    names = others.decode(errors="replace").splitlines()
    if cut := len(patch) > _MOST_BYTES:
        patch = patch[: patch.rfind(b"\n", 0, _MOST_BYTES) + 1]
    more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return CodeState(commit.decode().strip(), patch, cut, names[:_MOST_NAMES] + more)


def told(facts: dict[str, Any]) -> str:
    """A state's facts, for a person."""
    return f"{facts['commit'][:12]}{' with uncommitted changes' if facts.get('dirty') else ''}"


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git says, or None. No more than one may keep of it is read."""
    # Within a hook these would name another repository.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # do not write to the index for having looked
    command = ["git", "-c", "core.quotePath=false", "-C", str(root), *arguments]
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError:
        return None
    with process:
        assert process.stdout
        limit = threading.Timer(_SECONDS, process.kill)
        limit.start()
        answer = process.stdout.read(_MOST_BYTES + 1)
        whole = len(answer) <= _MOST_BYTES
        if not whole:
            process.kill()
        code = process.wait()
        limit.cancel()
    return answer if code == 0 or not whole else None
