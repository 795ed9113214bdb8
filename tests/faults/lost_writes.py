"""What a folder looks like when the power comes back: without what was not synced."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from regrowth.pretrain.checkpoint import verify
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.run_folder import RunFolder
from tests.faults.inject.strict_disk import key_of, record


def need_births(folder: Path) -> None:
    """Skip where files cannot be told apart by their time of birth."""
    try:
        key_of(folder)
    except (OSError, AttributeError) as error:
        pytest.skip(f"a strict disk needs the times of birth of files: {error}")


def strict_disk(root: Path, cut: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a strict disk below `root`, which begins with all that is there."""
    journal = root.with_name(f"{root.name}.journal")
    shutil.rmtree(journal, ignore_errors=True)
    journal.mkdir()
    root.mkdir(exist_ok=True)
    for path in (root, *root.rglob("*")):
        record(path, journal)()
    return {"root": str(root), "journal": str(journal), "cut": cut}


def lose_what_was_not_synced(disk: dict[str, Any], keep_entries: bool = False) -> None:
    """Leave of a strict disk's folder what it has to keep.

    Args:
        keep_entries: folders are as they were in the end, as when the file system wrote its own records in time, and only the files' bytes are lost.
    """
    root, journal = Path(disk["root"]), Path(disk["journal"])
    kept = root.with_name(f"{root.name}.kept")
    if keep_entries:
        _keep_bytes(root, kept, journal)
    else:
        _keep(key_of(root), kept, journal)
    shutil.rmtree(root)
    kept.rename(root)


def checkpoints_told_of(run: RunFolder) -> set[str]:
    """Those that the run has said to be written."""
    return {event["path"] for event in run.rows("events") if event["event"] == "checkpoint"}


def whole_checkpoints(run: RunFolder) -> set[str]:
    """All that bear a checkpoint's name, each of which has to be whole.

    Raises:
        UserError: one is not.
    """
    return {path.name for path in list_checkpoints(run.path) if verify(path)}


def _keep(folder: str, to: Path, journal: Path) -> None:
    to.mkdir(mode=0o700)
    if (noted := journal / folder).exists():
        for name, (key, is_folder) in json.loads(noted.read_text()).items():
            if is_folder:
                _keep(key, to / name, journal)
            else:
                _keep_file(key, to / name, journal)


def _keep_bytes(folder: Path, to: Path, journal: Path) -> None:
    to.mkdir(mode=0o700)
    for path in folder.iterdir():
        if path.is_dir():
            _keep_bytes(path, to / path.name, journal)
        else:
            _keep_file(key_of(path), to / path.name, journal)


def _keep_file(key: str, to: Path, journal: Path) -> None:
    to.write_bytes((journal / key).read_bytes() if (journal / key).exists() else b"")
