"""Runs whose corpus is finished already: in a folder, or at an address."""

from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.corpus import Corpus
from regrowth.pretrain.config import RunConfig
from regrowth.settings import to_toml
from tests.conftest import small_run_values
from tests.launch.helpers import call, one_letter, only_run, regrowth
from tests.pretrain.helpers import losses


def write(path: Path, folder: Path, **sections: Any) -> Path:
    """A config without a [data] section."""
    values = small_run_values(Path("unused"), folder, folder / "runs", run={"steps": 4}, **sections)
    values.pop("data")
    path.write_text(to_toml(RunConfig.model_validate(values)))
    return path


@pytest.mark.slow
def test_a_run_reads_its_corpus_from_an_address_as_from_a_folder(
    s3: Any, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.mkdir("own")
    for path in corpus.folder.rglob("*"):
        if path.is_file() and path.parts[-2] != "curated":
            s3.pipe(f"own/small/{path.relative_to(corpus.folder)}", path.read_bytes())
    far = write(tmp_path / "far.toml", tmp_path / "far", loader={"corpus": "s3://own/small", "cache": str(tmp_path / "cache")},
                parallel={"dp_shard": 2, "micro_batch": 4})  # fmt: skip
    near = write(tmp_path / "near.toml", tmp_path / "near", loader={"corpus": str(corpus.folder)})
    done = regrowth("train", far)
    assert done.returncode == 0, done.stderr + done.stdout
    code, output = call(capsys, monkeypatch, "train", near)
    assert code == 0, output
    there, here = only_run(tmp_path / "far"), only_run(tmp_path / "near")
    assert losses(there) == pytest.approx(losses(here), rel=1e-6)
    assert [row["draws"] for row in there.decisions()] == [row["draws"] for row in here.decisions()]
    for command in (
        ["mix", "explain", there.path, "--step", "2"],
        ["report", there.path],
        ["train", "--resume", there.path, "run.steps=5"],
    ):
        code, output = call(capsys, monkeypatch, *command)
        assert code == 0, output
    code, output = call(capsys, monkeypatch, "train", "--resume", there.path, f"loader.corpus={corpus.folder}")
    assert code == 2 and "loader.corpus cannot change once a run has begun" in one_letter(output)


def test_what_cannot_be_read_is_told_before_a_run_begins(
    s3: Any, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path / "c.toml", tmp_path, loader={"corpus": str(corpus.folder)})
    for place, told in (
        ("s3://own/nothing", "s3://own/nothing/corpus.json: there is nothing there"),
        (str(tmp_path / "nowhere"), "this corpus does not exist"),
    ):
        code, output = call(capsys, monkeypatch, "train", config, f"loader.corpus={place}")
        assert code == 2 and told in one_letter(output)
    code, output = call(capsys, monkeypatch, "train", config, "--dry-run")
    assert code == 0 and f"corpus {corpus.folder}" in output.replace("\n", "")
    nothing = tmp_path / "nothing.toml"
    nothing.write_text("".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("corpus =")))
    code, output = call(capsys, monkeypatch, "train", nothing)
    assert code == 2 and "a [data] section to prepare it from, or loader.corpus" in one_letter(output)
    assert not (tmp_path / "runs").exists()
