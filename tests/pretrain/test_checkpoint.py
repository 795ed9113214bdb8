"""A checkpoint is whole or refused, and loads on any number of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import UserError
from regrowth.files import sha256_of
from regrowth.pretrain.checkpoint import load_plain, newest_whole, verify
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.run_folder import RunFolder
from tests.pretrain.helpers import Ranks, cut_back, go, losses, new_run


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> RunFolder:
    """A finished run on two sharded ranks with checkpoints at steps 4, 8 and 12."""
    return go(
        new_run(corpus, tmp_path_factory.mktemp("runs"), run={"steps": 12}, parallel={"dp_shard": 2, "micro_batch": 2}), corpus, ranks
    )


@pytest.fixture
def run(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy that a test may damage."""
    return RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))


def files_of(checkpoint: Path) -> list[str]:
    return sorted(json.loads((checkpoint / "manifest.json").read_text())["files"])


def test_it_holds_safetensors_and_json_and_nothing_else(run: RunFolder) -> None:
    path = list_checkpoints(run.path)[-1]
    assert {f.suffix for f in path.rglob("*") if f.is_file()} == {".safetensors", ".json"}
    assert any(f.startswith("model/shard-00002") for f in files_of(path)), "each rank wrote its shards"
    verify(path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "flip in the header", "flip the header's size", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(damage: str, run: RunFolder) -> None:
    before, last = list_checkpoints(run.path)[-2:]
    victims = [last / name for name in files_of(last) if name.endswith(".safetensors")]
    victim = victims[0]
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage.startswith("flip"):
        data = bytearray(victim.read_bytes())
        data[{"flip": -3, "flip in the header": 12, "flip the header's size": 6}[damage]] ^= 4
        victim.write_bytes(data)
    elif damage == "remove":
        victim.unlink()
    else:
        victim = last / "manifest.json"
        victim.unlink()
    with pytest.raises(UserError) as error:
        verify(last)
    assert str(last) in str(error.value) and victim.name in str(error.value)
    newest, refused = newest_whole(run.path)
    assert newest == before and len(refused) == 1


def test_a_checkpoint_of_the_first_format_is_read(run: RunFolder) -> None:
    last = list_checkpoints(run.path)[-1]
    manifest = json.loads((last / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry.pop("sum_of_sums", None)
        entry["sha256"] = sha256_of(last / name)
    (last / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert newest_whole(run.path) == (last, [])
    with (last / files_of(last)[-2]).open("r+b") as victim:
        victim.write(b"\1")
    with pytest.raises(UserError, match="was altered"):
        verify(last)


@pytest.mark.parametrize("name", ["model.json", "loader.json", "trainer.json", "lineage.json"])
def test_every_file_is_covered_by_the_manifest(name: str, run: RunFolder) -> None:
    path = list_checkpoints(run.path)[-1]
    (path / name).write_text((path / name).read_text().replace("1", "2", 1))
    with pytest.raises(UserError, match=name):
        verify(path)


def test_weights_and_moments_load_alike_on_one_process(finished: RunFolder) -> None:
    state, weights, moments = load_plain(list_checkpoints(finished.path)[-1])
    assert sum(w.numel() for w in weights.values()) == state.model.parameters
    assert set(moments) == {f"{n}.{m}" for n in weights for m in ("exp_avg", "exp_avg_sq")}
    assert all(torch.isfinite(t).all() for t in (*weights.values(), *moments.values()))
    assert all((moments[f"{n}.exp_avg_sq"] >= 0).all() and moments[f"{n}.exp_avg_sq"].sum() > 0 for n in weights)
    assert (state.trainer["step"], state.trainer["optimizer_steps"]) == (12, 12)
    assert state.lineage.tokens == sum(row["tokens"] for row in finished.rows("metrics"))
    assert state.lineage.train_flops == pytest.approx(state.lineage.tokens * state.model.train_flops_per_token(64))


def test_resuming_on_the_same_plan_is_bit_exact(run: RunFolder, finished: RunFolder, corpus: Corpus, ranks: Ranks) -> None:
    cut_back(run, 8)
    go(run, corpus, ranks)
    assert losses(run) == losses(finished)
    assert run.decisions() == finished.decisions()
    for (_, mine, m1), (_, theirs, m2) in [(load_plain(list_checkpoints(run.path)[-1]), load_plain(list_checkpoints(finished.path)[-1]))]:
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs) and all(torch.equal(m1[n], m2[n]) for n in m2)
    assert verify(list_checkpoints(run.path)[-1])["id"] == verify(list_checkpoints(finished.path)[-1])["id"]


@pytest.mark.parametrize(
    "plan", [{"dp_shard": 1, "micro_batch": 4}, {"dp_replicate": 2, "dp_shard": 2, "micro_batch": 1}], ids=["1 rank", "4 ranks"]
)
def test_resuming_on_another_plan_reads_the_same_sequences(
    plan: dict, run: RunFolder, finished: RunFolder, corpus: Corpus, ranks: Ranks
) -> None:
    from regrowth.files import write_text
    from regrowth.settings import to_toml

    cut_back(run, 4)
    config = run.config()
    changed = config.model_copy(update={"parallel": type(config.parallel).model_validate(plan)})
    write_text(run.path / "config.toml", to_toml(changed))
    go(run, corpus, ranks)
    assert losses(run) == pytest.approx(losses(finished), rel=1e-5)
    assert losses(run)[:4] == losses(finished)[:4]
    assert [row["draws"] for row in run.decisions()] == [row["draws"] for row in finished.decisions()]
    theirs, ours = (load_plain(list_checkpoints(r.path)[-1])[0].loader for r in (finished, run))
    assert ours["cursors"] == theirs["cursors"]


def test_a_refused_checkpoint_is_set_aside_and_does_not_push_out_a_whole_one(run: RunFolder, corpus: Corpus, ranks: Ranks) -> None:
    cut_back(run, 12)
    for path in list_checkpoints(run.path):
        (path / "model.json").write_text("{}")
    go(run, corpus, ranks)
    assert [p.name for p in sorted((run.path / "checkpoints").iterdir())] == [
        *("refused-step-000004", "refused-step-000008", "refused-step-000012"),
        *("step-000004", "step-000008", "step-000012"),
    ]


def test_a_run_that_is_running_is_not_started_twice(run: RunFolder, corpus: Corpus, ranks: Ranks) -> None:
    from regrowth.files import exclusive
    from regrowth.parallel.ranks import RankError

    with exclusive(run.path / ".lock"), pytest.raises(RankError, match="another process is running this run"):
        go(run, corpus, ranks)


def test_only_the_newest_are_kept_and_a_killed_writers_rest_is_cleared(run: RunFolder, corpus: Corpus, ranks: Ranks) -> None:
    cut_back(run, 8)
    litter = run.path / "checkpoints/.step-000012.partial"
    litter.mkdir()
    (litter / "half.safetensors").write_bytes(b"x")
    go(run, corpus, ranks)
    assert [p.name for p in list_checkpoints(run.path)] == ["step-000004", "step-000008", "step-000012"]
    assert not litter.exists()


def test_a_checkpoint_of_another_corpus_is_refused(run: RunFolder, corpus: Corpus, documents: Path, tmp_path: Path, ranks: Ranks) -> None:
    from regrowth.data_pipeline.config import DataConfig
    from regrowth.data_pipeline.prepare import prepare
    from regrowth.parallel.ranks import RankError

    config = DataConfig.model_validate(corpus.manifest["config"]).model_copy(update={"out": tmp_path, "heldout_fraction": 0.3})
    other = prepare(config)
    cut_back(run, 8)
    with pytest.raises(RankError, match="loader state is of another corpus"):
        go(run, other, ranks)


def test_a_rank_that_has_removed_old_checkpoints_waits_for_the_others_as_any_rank_does(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the phase of a checkpoint, which may last long, a hang of another rank would be found as late."""
    from regrowth.pretrain.saving import Saving
    from regrowth.pretrain.train import Trainer, train

    phases: list[tuple[bool, str]] = []
    noted: list[Saving] = []
    note, exchange = Saving._note, Trainer._exchange
    monkeypatch.setattr(Saving, "_note", lambda self, saved: noted.append(self) or note(self, saved))

    def exchanged(self: Trainer, tokens: int, weight: float) -> tuple[int, float, bool]:
        if thread := self.saving.background._thread:
            thread.join()
        noted.clear()
        out = exchange(self, tokens, weight)
        phases.append((bool(noted), self.heart._at[1]))  # type: ignore[index]
        return out

    monkeypatch.setattr(Trainer, "_exchange", exchanged)
    run = new_run(corpus, tmp_path)
    train(run.path, corpus.folder)  # one rank, in this process
    assert (True, "data") in phases and {phase for _, phase in phases} == {"data"}
