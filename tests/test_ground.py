"""The ground under the rooms: files that are whole or absent, and logs that survive a torn line."""

import errno
from pathlib import Path

import pytest

from regrowth.errors import RunFailed
from regrowth.files import append_jsonl, atomic_path, read_jsonl


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append_jsonl(log, {"step": 0})
    with log.open("a") as out:
        out.write('{"step": 1, "los')  # the writer was killed, or the disk was full
    append_jsonl(log, {"step": 2, "name": "é"})
    append_jsonl(log, {"step": 3})
    assert [row["step"] for row in read_jsonl(log)] == [0, 2, 3]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "sub/file"
    with pytest.raises(ZeroDivisionError), atomic_path(target) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert list(target.parent.iterdir()) == []
    with atomic_path(target) as partial:
        partial.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole" and len(list(target.parent.iterdir())) == 1


def test_a_full_disk_is_a_letter_and_leaves_what_stood_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    with pytest.raises(RunFailed, match=r"file: the disk is full \(.* MiB free on it\)"), atomic_path(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "before"
