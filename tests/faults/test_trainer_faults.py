"""What can go wrong in a run of several ranks, made to go wrong: a rank that hangs, ranks that differ, spikes, a full disk behind a background write."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import UserError
from regrowth.parallel.agree import check_same
from regrowth.pretrain.checkpoint import read_state, verify
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.safety import SafetyConfig, StepGuard
from regrowth.pretrain.train import Trainer, train
from tests.faults.test_real_faults import one_letter, only_run, steps_done, wait_for, workers
from tests.launch.helpers import regrowth, start, write_config
from tests.pretrain.helpers import Ranks, before_step, go, losses, new_run


@pytest.mark.parametrize(
    "plan", [{"tp": 2, "micro_batch": 4}, *(pytest.param(p, marks=pytest.mark.slow) for p in ({"dp_shard": 2, "micro_batch": 4}, {"pp": 2, "micro_batch": 4}))], ids=str
)  # fmt: skip
def test_a_rank_that_hangs_is_named_by_those_who_waited(plan: dict, documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000, "timeout_seconds": 6}, parallel=plan,
                          supervision={"restarts": 0})  # fmt: skip
    launcher = start("train", config)
    wait_for(lambda: steps_done(tmp_path) > 3, launcher)
    stopped = workers(launcher)[1]
    os.kill(stopped, signal.SIGSTOP)
    output = launcher.communicate(timeout=90)[0]
    letter = one_letter(output)
    assert launcher.returncode == 1 and "rank 0 (step" in letter and "waited in vain for rank 1 on" in letter, letter
    assert "regrowth train --resume" in letter


@pytest.mark.slow
def test_a_rank_that_hangs_under_torchrun_is_named_as_soon(documents: Path, tmp_path: Path) -> None:
    """There the group is made with a day's patience, for the preparation of data."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000, "timeout_seconds": 6},
                          parallel={"dp_shard": 2, "micro_batch": 4})  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "regrowth", "train", str(config)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: steps_done(tmp_path) > 3, launcher)
    os.kill(workers(launcher)[1], signal.SIGSTOP)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode != 0 and "waited in vain for rank 1 on" in output, output[-3000:]


@pytest.mark.slow
def test_compiled_kernels_are_kept_where_the_config_says(documents: Path, tmp_path: Path) -> None:
    run = {"steps": 2, "compile_cache": str(tmp_path / "kernels")}
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run=run, parallel={"micro_batch": 4, "compile": True})
    done = regrowth("train", config)
    assert done.returncode == 0, done.stderr
    kept = set((tmp_path / "kernels").rglob("*.so"))
    assert kept
    assert regrowth("train", config, "run.name=again").returncode == 0
    assert set((tmp_path / "kernels").rglob("*.so")) == kept, "nothing was compiled anew"


def differ(rank: int) -> str:
    import torch.distributed as dist

    try:
        check_same({"the version of torch": "2.13", "the hash of the config": "b" if dist.get_rank() == rank else "a"})
    except UserError as error:
        return str(error)
    return "the same"


def test_ranks_that_differ_are_named_on_every_rank(ranks: Ranks) -> None:
    letters = ranks(2).run(differ, 1)
    assert letters[0] == letters[1] and letters[0].startswith("rank 1: the hash of the config is 'b', on rank 0 it is 'a'")
    assert ranks(2).run(differ, 5) == ["the same"] * 2


def test_outliers_are_told_from_slow_changes() -> None:
    guard = StepGuard(SafetyConfig(window=16))
    for step in range(15):
        guard.observe(5.0 + 0.1 * math.sin(step), 1.0, True)
    assert guard.loss_limit == math.inf, "too early to say"
    guard.observe(5.0, 1.0, True)
    assert 5.1 < guard.loss_limit < 5.8 and guard.norm_limit == pytest.approx(1.006)
    copy = StepGuard(guard.config)
    copy.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert copy.loss_limit == guard.loss_limit
    for _ in range(5):
        assert not guard.spoilt
        guard.observe(50.0, 1.0, False)
    assert guard.spoilt and guard.loss_limit < 5.8, "outliers do not move the limit"
    guard.observe(5.0, 1.0, True)
    assert not guard.spoilt
    for step in range(200):  # a level that rises slowly is followed
        assert 5 + step * 0.02 < guard.loss_limit
        guard.observe(5 + step * 0.02, 1.0, True)


def spoil(folder: Path, corpus: Path, at: int, count: int) -> None:
    """Train with weights that are blown up before step `at`, `count` times."""
    left = [count]

    def spoiling(trainer: Trainer, number: int) -> None:
        if number == at and left[0]:
            left[0] -= 1
            with torch.no_grad():
                for name, weight in trainer.session.engine.weights().items():
                    if name == "norm.weight":
                        weight.mul_(30.0)

    with before_step(spoiling):
        train(folder, corpus)


@pytest.mark.parametrize(
    "plan", [pytest.param({"dp_shard": 2, "micro_batch": 4}, marks=pytest.mark.slow), {"pp": 2, "micro_batch": 4}], ids=str
)
def test_a_spike_skips_steps_then_returns_to_a_checkpoint_and_reads_other_data(
    plan: dict, corpus: Corpus, tmp_path: Path, ranks: Ranks
) -> None:
    run = new_run(
        corpus,
        tmp_path,
        run={"steps": 40},
        parallel=plan,
        checkpoint={"every": 5, "keep": 8},
        safety={"window": 8, "rewind_after": 3, "skip_sigma": 20},
    )
    ranks(2).run(spoil, run.path, corpus.folder, 23, 1)
    events = run.rows("events")
    skipped = [e["step"] for e in events if e["event"] == "skipped step"]
    (back,) = [e for e in events if e["event"] == "rewound"]
    assert skipped[:3] == [23, 24, 25] and back["step"] == 26 and back["to"] == 20
    assert run.finished and [row["step"] for row in run.rows("metrics")] == list(range(40))
    assert losses(run)[-1] < losses(run)[0], "it learned on"
    assert (
        read_state(next(p for p in list_checkpoints(run.path) if p.name == "step-000020")).trainer["guard"]["rewinds"]
        == back["rewinds"]
        == 1
    )
    undisturbed = go(new_run(corpus, tmp_path / "other", run={"steps": 40}, parallel=plan), corpus, ranks)
    assert losses(run)[:20] == losses(undisturbed)[:20] and losses(run)[20] != losses(undisturbed)[20], "the data is another after it"


def test_without_a_way_back_ten_bad_steps_end_the_run(corpus: Corpus, tmp_path: Path) -> None:
    run = new_run(corpus, tmp_path, run={"steps": 40}, checkpoint={"every": 100}, safety={"window": 8, "rewind_after": 3, "skip_sigma": 20})
    with pytest.raises(Exception, match="an outlier for 10 steps in a row"):
        spoil(run.path, corpus.folder, 15, 1)
    assert any(e["event"] == "not rewound" for e in run.rows("events"))


def test_a_checkpoint_that_cannot_be_written_in_the_background_ends_the_run_and_the_last_one_stands(
    corpus: Corpus, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(corpus, tmp_path, run={"steps": 30}, checkpoint={"every": 5})

    def full(path: Path) -> object:
        usage = shutil._ntuple_diskusage  # type: ignore[attr-defined]
        return usage(10**12, 10**12, 100 if any(p.name == "step-000010" for p in list_checkpoints(run.path)) else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(Exception, match=r"needs .* MiB"):
        train(run.path, corpus.folder)
    assert list_checkpoints(run.path)[-1].name == "step-000010" and verify(list_checkpoints(run.path)[-1])
    assert not list(run.path.glob("checkpoints/.step-*"))
    monkeypatch.undo()
    train(run.path, corpus.folder)
    assert run.finished


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(documents: Path, tmp_path: Path) -> None:
    """Killed as soon as a half-written checkpoint is seen on disk."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 100_000}, checkpoint={"every": 3, "keep": 2},
                          supervision={"restarts": 0})  # fmt: skip
    launcher = start("train", config)
    wait_for(lambda: steps_done(tmp_path) > 10, launcher)
    run = only_run(tmp_path)
    until = time.monotonic() + 60
    while not list(run.path.glob("checkpoints/.step-*.partial")):
        assert time.monotonic() < until and launcher.poll() is None
    os.kill(workers(launcher)[0], signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert list_checkpoints(run.path) and all(verify(path) for path in list_checkpoints(run.path))


def test_out_of_memory_tells_where_it_went_and_what_helps(documents: Path, tmp_path: Path) -> None:
    """A real refusal of the allocator: the process may not have more address space than it took to start, and a little."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 1}, loader={"sequence_length": 4096, "global_batch": 16},
                          parallel={"micro_batch": 16})  # fmt: skip
    program = f"""
import resource, sys
from regrowth.pretrain import train as t
step = t.Trainer.train_step
def limited(self, n):
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), -1))
    step(self, n)
t.Trainer.train_step = limited
from regrowth.data_pipeline.prepare import prepare
from regrowth.pretrain.config import load_config
from regrowth.pretrain.run_folder import RunFolder
config = load_config({str(config)!r})
run = RunFolder.create(config)
t.train(run.path, prepare(config.data).folder)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert "rank 0 ran out of memory in step 0: peak" in done.stderr, done.stderr[-2000:]
    told = done.stderr.split("ran out of memory")[-1]
    for part in ("weights 0.00 GiB", "activations and the rest", "parallel.micro_batch=8 (now 16)", 'parallel.recompute="selective"'):
        assert part in told


def test_a_growth_that_fails_says_so_itself(documents: Path, tmp_path: Path) -> None:
    """The letter is of what failed, not of what the clearing away met."""
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 6}, growth=[{"at_step": 3}])
    program = f"""
from regrowth.errors import UserError
from regrowth.pretrain import train, trainer
built = trainer.Session
def small_only(config, corpus, mesh, checkpoint):
    if checkpoint is not None:
        raise UserError("the grown model does not fit")
    return built(config, corpus, mesh, checkpoint)
trainer.Session = small_only
from regrowth.data_pipeline.prepare import prepare
from regrowth.pretrain.config import load_config
from regrowth.pretrain.run_folder import RunFolder
config = load_config({str(config)!r})
run = RunFolder.create(config)
train.train(run.path, prepare(config.data).folder)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.stderr.strip().endswith("UserError: the grown model does not fit"), done.stderr[-2000:]


@pytest.mark.slow
def test_a_profile_says_where_a_step_goes(documents: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", documents, tmp_path, run={"steps": 8}, parallel={"dp_shard": 2, "micro_batch": 4})
    done = regrowth("train", config, "--profile")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path).path / "profile"
    table = (folder / "table.txt").read_text()
    assert "matrix products" in table and "communication" in table and "3 steps" in table
    assert all(json.loads((folder / f"trace-rank-{rank}.json").read_text())["traceEvents"] for rank in (0, 1))


def save_on_a_full_disk(folder: Path) -> str:
    """The write itself fails on one rank, after the check of free space has passed."""
    import torch.distributed as dist

    from regrowth.errors import RegrowthError
    from regrowth.pretrain.checkpoint import CheckpointState, save_checkpoint
    from regrowth.pretrain.lineage import Lineage
    from regrowth.pretrain.model_config import ModelConfig
    from regrowth.pretrain.tensor_files import StreamedWriter

    whole = StreamedWriter.write_data

    def full(self, plan, planner):  # type: ignore[no-untyped-def]
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return whole(self, plan, planner)

    StreamedWriter.write_data = full  # type: ignore[method-assign]
    try:
        tensors = {f"w{rank}": torch.ones(8) for rank in range(2)}
        save_checkpoint(folder / "step-000001", tensors, tensors, CheckpointState(ModelConfig(), Lineage(), {}, {"step": 1}))
    except RegrowthError as error:
        return str(error)
    finally:
        StreamedWriter.write_data = whole  # type: ignore[method-assign]
    return "written"


def test_a_disk_that_fills_up_in_mid_write_is_told_on_all_ranks(tmp_path: Path, ranks: Ranks) -> None:
    letters = ranks(2).run(save_on_a_full_disk, tmp_path)
    assert all("full" in letter.lower() or "no space" in letter.lower() for letter in letters), letters
    assert not list(tmp_path.iterdir())
