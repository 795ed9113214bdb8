"""A run's folder says which code, versions and devices it was made with, and keeps no secret."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from regrowth.files import read_json
from regrowth.pretrain import code_state as code
from regrowth.pretrain import snapshot
from regrowth.pretrain.code_state import code_state, told
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.report.build import _environment
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.snapshot import note_start, variables, write_snapshot
from tests.conftest import small_run_values


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a work tree of its own, committed."""
    root = tmp_path / "project"
    (root / "package").mkdir(parents=True)
    (root / "package/__init__.py").write_text("one = 1\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "begun")
    return root / "package/__init__.py"


@pytest.fixture
def run(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose snapshots are of that package."""
    monkeypatch.setattr(snapshot, "code_state", lambda: code_state(package))
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run"


def facts(folder: Path) -> dict[str, Any]:
    return read_json(folder / "environment.json")


def test_a_clean_commit_is_all_there_is_to_say(package: Path, run: Path) -> None:
    write_snapshot(run)
    assert facts(run)["code"] == {"commit": git(package.parent, "rev-parse", "HEAD").strip(), "dirty": False}
    assert not (run / "code.patch").exists()
    assert ("uncommitted changes", "none") in _environment(facts(run))


def test_the_patch_makes_the_code_again(package: Path, run: Path, tmp_path: Path) -> None:
    package.write_text("one = 1\ntwo = 2\n")
    (package.parent / "new.py").write_text("secret = 'not to be kept'\n")
    (package.parent / "data.bin").write_text("no code")
    write_snapshot(run)
    found = facts(run)["code"]
    assert found["dirty"] and found["untracked"] == ["package/new.py"] and not found["patch_cut"]
    assert (run / "code.patch").stat().st_mode & 0o777 == 0o600
    text = (run / "code.patch").read_text()
    assert "package/new.py" in text and "not to be kept" not in text
    git(tmp_path, "clone", "-q", str(package.parents[1]), str(tmp_path / "again"))
    git(tmp_path / "again", "apply", str(run / "code.patch"))
    assert (tmp_path / "again/package/__init__.py").read_text() == package.read_text()
    assert ("uncommitted changes", "yes, in code.patch") in _environment(facts(run))


def test_a_large_patch_is_cut_at_a_line_and_says_so(package: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_MOST_BYTES", 1000)
    package.write_text("".join(f"line_{i} = {i}\n" for i in range(1000)))
    write_snapshot(run)
    text = (run / "code.patch").read_text()
    assert facts(run)["code"]["patch_cut"] and "The patch is cut after" in text and len(text) < 1300 and text.endswith("\n")


def test_other_code_at_a_later_start_is_an_event(package: Path, run: Path) -> None:
    package.write_text("one = 2\n")
    write_snapshot(run)
    before = facts(run)["code"]
    assert note_start(run, device="cpu", ranks=2) is None and (facts(run)["device"], facts(run)["ranks"]) == ("cpu", 2)
    git(package.parent, "commit", "-qam", "changed")
    event = note_start(run)
    assert event and event["event"] == "code changed" and event["from"] == f"{before['commit'][:12]} with uncommitted changes"
    assert event["to"] == told(facts(run)["code"]) == git(package.parent, "rev-parse", "HEAD")[:12]
    assert event["patch_before"] == "code-1.patch" and "+one = 2" in (run / "code-1.patch").read_text()
    assert not (run / "code.patch").exists() and note_start(run) is None
    package.write_text("one = 3\n")
    event = note_start(run)
    assert event and event["to"].endswith("with uncommitted changes") and "patch_before" not in event
    assert (run / "code.patch").exists()


def test_without_git_nothing_is_known_and_nothing_stops(package: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshot(run)
    known = facts(run)["code"]
    monkeypatch.setenv("PATH", "/nonexistent")
    assert code_state(package) is None and note_start(run) is None and facts(run)["code"] == known
    write_snapshot(run)
    assert facts(run)["code"] is None and not [row for row in _environment(facts(run)) if row[0] == "commit"]


def test_a_broken_or_slow_git_is_as_none(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin/git").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(code, "_SECONDS", 0.2)
        patch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
        assert code_state(package) is None
    (package.parents[1] / ".git/HEAD").write_text("nonsense")
    assert code_state(package) is None


def test_a_package_that_another_project_merely_holds_is_not_that_projects_commit(package: Path) -> None:
    installed = package.parents[1] / ".venv/lib/regrowth/__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert code_state(installed) is None


def test_secrets_and_paths_of_the_environment_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "^docker0,lo",
        "CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
        "TORCH_LOGS": "+dynamo",
        "SLURM_JOB_ID": "4711",
        "OMP_NUM_THREADS": "1",
    }
    withheld = {
        "NCCL_TOPO_FILE": "/home/somebody/topo.xml",
        "TORCH_TRACE": "hf_abcDEFghiJKLmnoPQR",
        "TORCH_X": "eyJhbGciOiJIUzI1NiJ9.abc",
        "GLOO_Y": "a8f5f167f44f4964e6c998dee827110c",
        "NCCL_Z": "https://name:word@host",
    }
    left_out = {
        "NCCL_AUTH_TOKEN": "1",
        "TORCH_API_KEY": "short",
        "AWS_SECRET_ACCESS_KEY": "x",
        "HF_TOKEN": "x",
        "HOME": "/home/somebody",
        "SLURM_JOB_USER": "x",
    }
    for name, value in (kept | withheld | left_out).items():
        monkeypatch.setenv(name, value)
    found = variables()
    assert {name: found[name] for name in kept} == kept
    assert {found[name] for name in withheld} == {"(set)"} and not left_out.keys() & found.keys()


def test_every_new_run_has_a_snapshot(documents: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(small_run_values(documents, tmp_path / "prepared", tmp_path / "runs"))
    found = facts(RunFolder.create(config).path)
    assert {"regrowth", "python", "packages", "variables", "code"} <= found.keys()
    assert (found["code"] is None) == (code_state() is None)
