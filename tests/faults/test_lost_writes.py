"""The power goes: the whole run is killed at once, and what it had not synced is gone. What it said to be written stands, and it goes on bit for bit."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.corpus import Corpus
from regrowth.files import append_jsonl, read_jsonl, write_text
from regrowth.pretrain.checkpoint import set_aside
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from tests.faults.helpers import configured, numbers, ranks_of, struck_by
from tests.faults.inject.strict_disk import StrictDisk
from tests.faults.lost_writes import checkpoints_told_of, lose_what_was_not_synced, need_births, strict_disk, whole_checkpoints
from tests.launch.helpers import one_letter, only_run, regrowth, start, wait_for

# (moment, where, after it, the checkpoint that has to stand then) of a run that writes its first checkpoint after step 4, and grows at 6
MOMENTS = {
    "before its manifest": ("sync", "step-000004.partial/manifest.json", False, None),
    "before its renaming": ("rename", "checkpoints/step-000004", False, None),
    "after its renaming": ("rename", "checkpoints/step-000004", True, None),
    "when it stands": ("sync", "/checkpoints", True, "step-000004"),
    "amid a growth": ("rename", "00001.safetensors.done", True, "step-000006"),
    "after a growth": ("rename", "checkpoints/step-000006-grown", True, "step-000006"),
}


@pytest.fixture(autouse=True)
def _births(tmp_path: Path) -> None:
    need_births(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("keep_entries", [False, True], ids=["all is lost", "entries stay"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_power_goes_while_a_checkpoint_is_written(
    moment: str, keep_entries: bool, undisturbed: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    call, path, after, stands = MOMENTS[moment]
    disk = strict_disk(tmp_path / "runs", {"call": call, "path": path, "after": after})
    launcher = start("train", configured(tmp_path, corpus), env=struck_by(disk=disk))
    output = launcher.communicate(timeout=150)[0]
    assert launcher.returncode == -signal.SIGKILL, output
    run = only_run(tmp_path)
    wait_for(lambda: not ranks_of(run))
    told = checkpoints_told_of(run)
    lose_what_was_not_synced(disk, keep_entries)
    assert {stands} - {None} | told <= whole_checkpoints(run)
    again = regrowth("train", "--resume", run.path)
    assert again.returncode == 0 and "Traceback" not in again.stderr, again.stdout + again.stderr
    assert numbers(run) == undisturbed
    assert not list(run.path.glob("checkpoints/.step-*")), "nothing half written is left"
    assert not [event for event in run.rows("events") if event["event"] == "checkpoint refused"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_power_goes_again_and_again(seed: int, undisturbed: dict[str, Any], corpus: Corpus, tmp_path: Path) -> None:
    rng, config = random.Random(seed), configured(tmp_path, corpus, checkpoint={"every": 2, "keep": 2})
    runs, refused, done = tmp_path / "runs", 0, False
    for cut in range(16):
        disk = strict_disk(runs, {"count": rng.randint(1, 160)} if cut < 15 else None)
        begun = list(runs.glob("*_*"))
        launcher = start("train", *(["--resume", *begun] if begun else [config]), env=struck_by(disk=disk))
        output = launcher.communicate(timeout=150)[0]
        if done := launcher.returncode == 0:
            break
        if launcher.returncode == 2:  # it had come to nothing yet
            assert begun and "start it anew" in one_letter(output)
            shutil.rmtree(begun[0])
            refused += 1
            continue
        assert launcher.returncode == -signal.SIGKILL, output
        wait_for(lambda: not any(ranks_of(only_run(tmp_path)) for _ in runs.glob("*_*")))
        told = {name for _ in runs.glob("*_*") for name in checkpoints_told_of(only_run(tmp_path))}
        lose_what_was_not_synced(disk, keep_entries=rng.random() < 0.3)
        if told:
            assert max(told) in whole_checkpoints(only_run(tmp_path)), "those before may have been removed"
    assert done and cut > 3
    assert numbers(only_run(tmp_path)) == undisturbed


def test_a_run_that_never_began_says_so(corpus: Corpus, tmp_path: Path) -> None:
    disk = strict_disk(tmp_path / "runs", {"call": "rename", "path": "/environment.json", "after": False})
    launcher = start("train", configured(tmp_path, corpus), env=struck_by(disk=disk))
    assert launcher.wait(timeout=60) == -signal.SIGKILL
    lose_what_was_not_synced(disk)
    run = only_run(tmp_path)
    again = regrowth("train", "--resume", run.path)
    assert again.returncode == 2 and "start it anew" in one_letter(again.stdout + again.stderr)


def test_a_file_is_on_the_disk_with_the_folders_it_is_in(tmp_path: Path) -> None:
    disk = strict_disk(tmp_path / "root")
    with StrictDisk(**disk):
        write_text(tmp_path / "root/new/newer/file", "first")
        write_text(tmp_path / "root/new/newer/file", "second")
    lose_what_was_not_synced(disk)
    assert (tmp_path / "root/new/newer/file").read_text() == "second"


def test_what_was_set_aside_stays_aside(tmp_path: Path) -> None:
    """Behind a return to an earlier checkpoint, the later ones must not come back."""
    for step in (4, 8):
        (tmp_path / f"root/checkpoints/step-00000{step}").mkdir(parents=True)
    disk = strict_disk(tmp_path / "root")
    with StrictDisk(**disk):
        set_aside(tmp_path / "root", newer_than=tmp_path / "root/checkpoints/step-000004")
    lose_what_was_not_synced(disk)
    assert [path.name for path in list_checkpoints(tmp_path / "root")] == ["step-000004"]


def test_the_disk_of_these_tests_forgets_what_was_not_synced(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_text("old")
    (root / "gone").write_text("gone")
    append_jsonl(root / "log", {"row": 1})
    for keep_entries in (True, False):
        disk = strict_disk(root)
        with StrictDisk(**disk):
            append_jsonl(root / "log", {"row": 2})
            (root / "new").write_text("new")
            (root / "gone").unlink()
            (root / "young").write_text("young")  # perhaps where `gone` was
            (root / "old").rename(root / "renamed")
        lose_what_was_not_synced(disk, keep_entries)
        assert read_jsonl(root / "log") == [{"row": 1}]
        if keep_entries:
            assert (root / "renamed").read_text() == "old" and (root / "young").read_text() == (root / "new").read_text() == ""
            assert not (root / "gone").exists()
            (root / "renamed").rename(root / "old")
            (root / "gone").write_text("gone")
            (root / "new").unlink()
            (root / "young").unlink()
    assert {path.name: path.read_text() for path in root.iterdir() if path.name != "log"} == {"old": "old", "gone": "gone"}
