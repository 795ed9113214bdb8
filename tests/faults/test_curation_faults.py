"""Curation under real faults: killed processes, bombs, broken files, forbidden folders, a full disk. Nothing is lost, nothing is there twice."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import prepare
from regrowth.settings import to_toml
from tests.conftest import prose, small_data_values, write_jsonl
from tests.launch.helpers import one_letter, regrowth

KINDS = [
    {"kind": "normalise"},
    {"kind": "gopher_repetition"},
    {"kind": "exact_dedup"},
    {"kind": "minhash_dedup"},
    {"kind": "line_dedup", "memory_megabytes": 1},
    {"kind": "mask_pii"},
]


def write_recipe(path: Path, values: dict) -> Path:
    config = DataConfig.model_validate(values)
    path.write_text("[data]\n" + to_toml(config).replace("\n[", "\n[data.").replace("[data.[", "[[data."))
    return path


def documents(folder: Path, files: int) -> None:
    for f in range(files):
        rows = [{"text": prose(f * 1000 + i, 12) + ("\n\nThe same last paragraph for everyone." if i % 5 == 0 else "")} for i in range(20)]
        rows.append({"text": prose(0, 12)})  # a copy
        write_jsonl(folder / f"f{f:02d}.jsonl", rows)


def children(pid: int) -> list[int]:
    done = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in done.stdout.splitlines() if "resource_tracker" not in line and "ps -o" not in line]


def outputs(corpus: Corpus) -> dict[str, str]:
    return {row["path"]: row["sha256"] for by in corpus.manifest["splits"].values() for rows in by.values() for row in rows}


def kill_at_random(tmp_path: Path, kills: int, files: int, seed: int) -> None:
    """Kill workers (they are replaced) and whole runs (they are begun again) at random moments until enough have been killed."""
    documents(tmp_path / "in", files)
    values = {**small_data_values(tmp_path / "in", tmp_path / "out"), "transforms": KINDS, "workers": 2, "item_megabytes": 0.02}
    values["executor"] = {"attempts": 100}
    reference = prepare(DataConfig.model_validate({**values, "out": str(tmp_path / "reference"), "workers": 1}))
    recipe = write_recipe(tmp_path / "recipe.toml", values)
    rng, killed, rounds = random.Random(seed), 0, 0
    while killed < kills:
        if rounds and (rounds % 3 == 0 or list((tmp_path / "out").glob("*/corpus.json"))):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)  # finished before enough were killed: from the start
        rounds += 1
        process = subprocess.Popen(
            [sys.executable, "-m", "regrowth", "data", "run", str(recipe)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and killed < kills:
            time.sleep(rng.uniform(0.05, 0.7))
            victims = children(process.pid)
            victim = rng.choice([process.pid, *victims, *victims, *victims])
            if process.poll() is None:
                try:
                    os.kill(victim, signal.SIGKILL)
                    killed += 1
                except ProcessLookupError:
                    pass
        process.kill()
        process.communicate()
    corpus = prepare(DataConfig.model_validate(values))
    assert outputs(corpus) == outputs(reference) and corpus.manifest["funnel"] == reference.manifest["funnel"]
    corpus.verify()


def test_killing_workers_and_runs_at_random_changes_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, kills=6, files=8, seed=1)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, kills=50, files=16, seed=2)


def test_a_worker_that_always_dies_fails_its_task_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents(tmp_path / "in", 4)
    values = {**small_data_values(tmp_path / "in", tmp_path / "out"), "workers": 2, "executor": {"attempts": 2}}
    code = """
import json, os, signal, sys
from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.phases.curate import CuratePhase
real = CuratePhase.run
def dies(self, task):
    if task == 2: os.kill(os.getpid(), signal.SIGKILL)
    return real(self, task)
CuratePhase.run = dies
if __name__ == "__main__":
    from regrowth.data_pipeline.prepare import prepare
    prepare(DataConfig.model_validate(json.loads(sys.argv[1])))
"""
    script = tmp_path / "dies.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script), json.dumps(values)], capture_output=True, text=True, timeout=120)
    assert "the process of task 2 was killed 2 times" in done.stderr
    corpus = prepare(DataConfig.model_validate(values))  # without the fault it goes on
    assert sum(n for _, t, r, n, _ in corpus.manifest["funnel"] if (t, r) == ("source", "")) == 84


def test_failed_inputs_are_left_out_by_name_when_that_is_allowed(tmp_path: Path) -> None:
    documents(tmp_path / "in", 5)
    values = {**small_data_values(tmp_path / "in", tmp_path / "out"), "executor": {"max_failed": 1}, "item_megabytes": 0.01}
    config = DataConfig.model_validate(values)
    pipeline = Pipeline.plan_of(config).begin()
    victim = pipeline.items[3][1].paths[0]
    from regrowth.data_pipeline.phases.curate import CuratePhase
    from regrowth.errors import RunFailed

    real = CuratePhase.run
    with pytest.MonkeyPatch.context() as patch:

        def fails(self: CuratePhase, task: int) -> dict:
            if self.before is None and task == 3:
                raise RunFailed(f"{victim}: out of luck")
            return real(self, task)

        patch.setattr(CuratePhase, "run", fails)
        corpus = prepare(config)
        assert corpus.manifest["given_up"] == [f"{victim}: {victim}: out of luck"]
        with pytest.raises(RunFailed, match="out of luck"):
            prepare(DataConfig.model_validate({**values, "out": str(tmp_path / "strict"), "executor": {"max_failed": 0}}))
    left = sum(n for _, t, r, n, _ in corpus.manifest["funnel"] if (t, r) == ("source", ""))
    recipe = write_recipe(tmp_path / "recipe.toml", values)
    done = regrowth("data", "run", recipe, "--retry-failed")
    assert done.returncode == 0, done.stderr
    again = Corpus.open(corpus.folder)
    assert again.manifest["given_up"] == []
    assert sum(n for _, t, r, n, _ in again.manifest["funnel"] if (t, r) == ("source", "")) > left


def reasons_of(corpus: Corpus) -> Counter:
    counted: Counter = Counter()
    for _, transform, reason, documents_, _ in corpus.manifest["funnel"]:
        if reason and transform == "source":
            counted[transform, reason] += documents_
    return counted


def test_bad_files_cost_themselves_and_are_named_with_their_offsets(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_jsonl(folder / "good.jsonl", [{"text": prose(i, 12)} for i in range(40)])
    packed = gzip.compress(b"".join(json.dumps({"text": prose(100 + i, 12)}).encode() + b"\n" for i in range(200)))
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "lines.jsonl").write_bytes(b'{"text": "x"\n[1, 2]\n{"text": 5}\n\xff\xfe\n{"text": "\\ud800 alone"}\n')
    (folder / "sub").mkdir()
    (folder / "sub/good.jsonl").write_text(json.dumps({"text": prose(900, 12)}) + "\n")  # a name that is there twice
    with gzip.open(folder / "bomb.jsonl.gz", "wb", compresslevel=9) as bomb:
        for _ in range(400):
            bomb.write(bytes(1 << 20))
    corpus = prepare(DataConfig.model_validate(small_data_values(folder, tmp_path / "out")))
    reasons = reasons_of(corpus)
    assert reasons["source", "damaged_file"] == 2 and reasons["source", "not_json"] == 2 and reasons["source", "no_text"] == 2, reasons
    import pyarrow as pa

    rows = [
        row
        for path in sorted((corpus.folder / "dropped").glob("0-curate-*.arrow"))
        for row in pa.ipc.open_stream(pa.memory_map(str(path))).read_all().to_pylist()
    ]
    told = {row["source"].rpartition("/")[2]: json.loads(row["meta"]).get("error", "") for row in rows if row["transform"] == "source"}
    assert "ends in the middle" in next(e for s, e in told.items() if s.startswith("cut.jsonl.gz@after-"))
    assert "more than 200 times its size" in next(e for s, e in told.items() if s.startswith("bomb.jsonl.gz@after-"))
    assert {"lines.jsonl@0", "lines.jsonl@13", "lines.jsonl@20"} <= set(told)
    corpus.verify()


def test_a_very_long_line_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    """A line of 1 GB: resident memory stays far below it."""
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/a.jsonl").open("wb") as out:
        out.write(b'{"text": "')
        for _ in range(1000):
            out.write(b"x" * 1_000_000)
        out.write(b'"}\n')
        for i in range(60):
            out.write(json.dumps({"text": prose(i, 12)}).encode() + b"\n")
    values = small_data_values(tmp_path / "in", tmp_path / "out")
    code = """
import json, re, sys
from pathlib import Path
from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.prepare import prepare
corpus = prepare(DataConfig.model_validate(json.loads(sys.argv[1])))
print(json.dumps([corpus.manifest["funnel"], int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024]))
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(values)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    funnel, resident = json.loads(done.stdout)
    assert [n for _, t, r, n, _ in funnel if (t, r) == ("source", "line_too_long")] == [1]
    assert sum(n for _, t, r, n, _ in funnel if (t, r) == ("source", "")) == 60
    assert resident < 400_000_000, resident


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become someone who may not read a folder")
def test_a_folder_that_may_not_be_listed_is_refused_and_a_file_is_dropped_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for i in range(40):
        (folder / f"d/t{i}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"d/t{i}.txt").write_text(prose(i, 12))
    (folder / "secret").mkdir(mode=0o700)
    (folder / "secret/x.txt").write_text(prose(99, 12))
    for path in [*[*tmp_path.parents][:2], tmp_path]:
        path.chmod(path.stat().st_mode | 0o055)
    values = {**small_data_values(folder, tmp_path / "out"), "sources": [{"kind": "text", "path": str(folder), "domain": "d"}]}
    (tmp_path / "out").mkdir(mode=0o777)
    (tmp_path / "out").chmod(0o777)
    code = """
import json, os, sys
from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.prepare import prepare
from regrowth.errors import RegrowthError
from regrowth.data_pipeline.sources import files, registry
from regrowth.data_pipeline.transforms import normalise, quality
import datasets, tokenizers, zstandard
try:
    import fastokens
except ImportError:
    pass
os.setgid(65534); os.setuid(65534)
try:
    print(json.dumps(prepare(DataConfig.model_validate(json.loads(sys.argv[1]))).manifest["funnel"]))
except RegrowthError as error:
    print("LETTER", error)
"""

    def as_nobody() -> str:
        environment = {**os.environ, "HOME": "/nonexistent"}
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(values)], capture_output=True, text=True, timeout=120, env=environment
        )
        return done.stdout + done.stderr

    told = as_nobody()
    assert "secret cannot be listed (Permission denied)" in told and "Traceback" not in told
    (folder / "secret").chmod(0o755)
    (folder / "secret/x.txt").chmod(0o600)
    funnel = json.loads(as_nobody())
    assert [n for _, t, r, n, _ in funnel if (t, r) == ("source", "unreadable_file")] == [1]


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        documents(tmp_path / "in", 60)
        for workers in ("1", "2"):
            recipe = write_recipe(tmp_path / "recipe.toml", {**small_data_values(tmp_path / "in", disk / workers), "item_megabytes": 0.05})
            done = regrowth("data", "run", recipe, f"data.workers={workers}")
            letter = one_letter(done.stdout + done.stderr)
            assert done.returncode == 1 and "the disk is full" in letter and "MiB free" in letter, done.stdout + done.stderr
            subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
            done = regrowth("data", "run", recipe)
            assert done.returncode == 0, done.stderr
            Corpus.open(next((disk / workers).glob("small-*"))).verify()
            shutil.rmtree(disk / workers)
            subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_changed_recipe_on_a_named_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    documents(tmp_path / "in", 3)
    values = {**small_data_values(tmp_path / "in", tmp_path / "out"), "folder": str(tmp_path / "named")}
    recipe = write_recipe(tmp_path / "recipe.toml", values)
    assert regrowth("data", "run", recipe).returncode == 0
    done = regrowth("data", "run", recipe, "data.heldout_fraction=0.3")
    letter = one_letter(done.stdout + done.stderr)
    assert done.returncode == 2 and "holds a corpus of another recipe" in letter
    assert "heldout_fraction" in done.stderr and "0.15" in done.stderr and "0.3" in done.stderr
    assert regrowth("data", "run", recipe, "data.workers=3", "data.executor.max_failed=2").returncode == 0, (
        "who does the work is no other recipe"
    )
    (tmp_path / "in/f00.jsonl").write_text(json.dumps({"text": prose(1, 9)}) + "\n")
    assert "f00.jsonl" in regrowth("data", "run", recipe).stderr


def test_two_sources_that_read_one_file_are_refused(tmp_path: Path) -> None:
    documents(tmp_path / "in", 2)
    values = small_data_values(tmp_path / "in", tmp_path / "out")
    values["sources"] = [*values["sources"], {"kind": "jsonl", "path": str(tmp_path / "in/f01.jsonl")}]
    done = regrowth("data", "run", write_recipe(tmp_path / "r.toml", values))
    assert done.returncode == 2 and "both read" in one_letter(done.stdout + done.stderr)
