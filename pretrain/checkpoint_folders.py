"""Where a run's checkpoints are, by name alone: for a launcher that imports no torch."""

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d+)(-grown)?$")


def checkpoint_path(run: Path, step: int, grown: bool = False) -> Path:
    """Where the checkpoint of a step goes."""
    return run / "checkpoints" / f"step-{step:06d}{'-grown' if grown else ''}"


def step_of(checkpoint: Path) -> int:
    """The number of steps that were done when a checkpoint was written.

    Raises:
        ValueError: it is not named like one.
    """
    found = _NAME.match(checkpoint.name)
    if found is None:
        raise ValueError(f"{checkpoint}: not named like a checkpoint (step-N, step-N-grown).")
    return int(found[1])


def list_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first; a grown one comes after the one it was grown from."""
    return sorted((p for p in (run / "checkpoints").glob("step-*") if _NAME.match(p.name)), key=lambda p: (step_of(p), p.name))
