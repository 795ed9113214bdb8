"""The data commands as users run them: the same corpus from every executor, and tools that look into it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regrowth.data_pipeline.config import ExecutorConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.launch.slurm import ArrayJob, render_array
from tests.conftest import prose, write_jsonl
from tests.launch.helpers import one_letter, regrowth, start, wait_for
from tests.slurm_cluster import SlurmCluster

RECIPE = """
[data]
out = "{out}"
name = "web"
item_megabytes = 0.02
heldout_fraction = 0.1
workers = 2
[[data.sources]]
kind = "jsonl"
path = "{source}"
[[data.transforms]]
kind = "normalise"
[[data.transforms]]
kind = "gopher_repetition"
[[data.transforms]]
kind = "exact_dedup"
[[data.transforms]]
kind = "minhash_dedup"
[[data.transforms]]
kind = "mask_pii"
[data.tokenizer]
vocabulary = 400
sample_megabytes = 1.0
[data.shards]
block_tokens = 2048
shard_tokens = 8192
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    base = prose(777, 40)
    rows = [{"text": prose(i, 20), "domain": "ab"[i % 2]} for i in range(120)]
    rows += [{"text": base, "domain": "a"}, {"text": base, "domain": "a"}, {"text": base + " One more sentence at the end.", "domain": "b"}]
    rows += [{"text": prose(900, 9) + " Write to someone@example.net.", "domain": "a"}, {"text": "word " * 200, "domain": "b"}]
    for f in range(5):
        write_jsonl(folder / f"f{f}.jsonl", rows[f::5])
    return folder


def recipe(folder: Path, source: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(out=folder / "out", source=source))
    return path


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("local")
    done = regrowth("data", "run", recipe(folder, source))
    assert done.returncode == 0, done.stderr
    (corpus,) = (folder / "out").glob("web-*")
    return Corpus.open(corpus)


def same(one: Corpus, two: Corpus) -> bool:
    return one.manifest["splits"] == two.manifest["splits"] and one.manifest["funnel"] == two.manifest["funnel"]


def test_mpi_ranks_make_the_same_corpus(source: Path, local: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="needs the mpi extra")
    mpirun = Path(sys.executable).parent / "mpirun"
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python (the mpi extra brings one)")
    done = subprocess.run([str(mpirun), "-n", "3", sys.executable, "-m", "regrowth", "data", "run", str(recipe(tmp_path, source))],
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (corpus,) = (tmp_path / "out").glob("web-*")
    assert same(Corpus.open(corpus), local)
    broken = tmp_path / "broken.toml"
    broken.write_text(recipe(tmp_path, source).read_text().replace(str(source), str(tmp_path / "nowhere")))
    done = subprocess.run(
        [str(mpirun), "-n", "2", sys.executable, "-m", "regrowth", "data", "run", str(broken)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "nowhere: there is no such file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_slurm_arrays_make_the_same_corpus_through_a_killed_task(
    cluster: SlurmCluster, source: Path, local: Corpus, tmp_path: Path
) -> None:
    path = recipe(tmp_path, source)
    options = ["data.executor.minutes=5", "data.executor.partition=ci", "data.executor.throttle=2", "data.workers=3"]
    process = start("data", "run", path, "--executor", "slurm", "--wait", *options)

    def curation_workers() -> list[int]:
        done = subprocess.run(["pgrep", "-f", f"data worker {tmp_path}/out.*--phase 0"], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    wait_for(lambda: curation_workers() or list((tmp_path / "out").glob("*/phases/0-curate/complete.json")), process)
    for pid in curation_workers()[:1]:
        subprocess.run(["kill", "-9", str(pid)])  # the node's memory ran out, say: the task is put back into the queue
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    (folder,) = (tmp_path / "out").glob("web-*")
    assert same(Corpus.open(folder), local), output
    assert re.search(r"0-curate: job \d+, 3 array tasks", output) and "regrowth data status" in output
    again = regrowth("data", "run", path, "--executor", "slurm", *options)
    assert "finished already" in again.stdout


@pytest.mark.slow
def test_slurm_says_when_too_much_failed(cluster: SlurmCluster, source: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, source)
    words = tmp_path / "words.txt"
    words.write_text("# none yet\n")
    path.write_text(path.read_text().replace('kind = "normalise"', f'kind = "blocked_words"\npath = "{words}"'))
    options = ["data.executor.minutes=5", "data.executor.partition=ci", "data.executor.attempts=1", "data.workers=2"]
    done = regrowth("data", "run", path, "--executor", "slurm", "--wait", *options)
    assert done.returncode == 1 and "no job is left in the queue and the corpus is not finished" in one_letter(done.stdout + done.stderr)
    (folder,) = (tmp_path / "out").glob("web-*")
    status = regrowth("data", "status", folder)
    assert str(words) in status.stdout and status.returncode == 0


def test_an_array_script_asks_for_what_the_recipe_says(tmp_path: Path) -> None:
    options = ExecutorConfig(
        kind="slurm", throttle=7, partition="cpu", account="lab", minutes=90, memory_gigabytes=2.5, setup=["module load x"], attempts=4
    )
    text = render_array(ArrayJob("name-0-curate", tmp_path / "it's here", 0, 64, after="12"), options)
    for line in ("#SBATCH --array=0-63%7", "#SBATCH --partition=cpu", "#SBATCH --account=lab", "#SBATCH --time=90", "#SBATCH --mem=2560",
                 "#SBATCH --dependency=afterany:12", "#SBATCH --requeue", "module load x"):  # fmt: skip
        assert line in text.splitlines()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "it'\"'\"'s here" in text and "-lt 4" in text


def test_the_scripts_of_all_phases_are_printed_and_nothing_is_submitted(source: Path, tmp_path: Path) -> None:
    done = regrowth("data", "run", recipe(tmp_path, source), "--executor", "slurm", "--print")
    assert done.returncode == 0 and done.stdout.count("#!/bin/bash") == 8 and "afterany:JOB_6" in done.stdout


def test_a_dry_run_tells_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = regrowth("data", "run", recipe(tmp_path, source), "--dry-run")
    assert "not begun; 10 items of 1 sources" in done.stdout and "0-curate, 1-exact_dedup, 2-minhash_bands" in done.stdout
    assert not (tmp_path / "out").exists()


def test_status_shows_every_phase_and_what_failed(local: Corpus) -> None:
    done = regrowth("data", "status", local.folder)
    assert done.returncode == 0 and "finished" in done.stdout and "10 / 10" in done.stdout
    assert regrowth("data", "status", local.folder.parent).returncode == 2


def test_a_document_is_traced_from_its_file_to_its_shard(local: Corpus, source: Path) -> None:
    survivors = regrowth("data", "trace", local.folder, "--source", source / "f0.jsonl", "--all")
    rows = [json.loads(line) for line in survivors.stdout.splitlines()]
    assert rows and all(row["source"].startswith(str(source / "f0.jsonl")) for row in rows)
    told = regrowth("data", "trace", local.folder, rows[0]["id"][:12]).stdout
    offset = int(rows[0]["source"].rpartition("@")[2])
    text = json.loads((source / "f0.jsonl").read_bytes()[offset:].split(b"\n")[0])["text"]
    assert repr(text[:100])[1:-1] in told and rows[0]["source"] in told and f"sharded: {rows[0]['shard']}" in told
    for step in ("normalise@1", "gopher_repetition@1", "exact_dedup", "minhash_dedup", "mask_pii@1"):
        assert step in told
    assert "no document has the id" in one_letter(regrowth("data", "trace", local.folder, "ffffffffffff").stderr)
    assert regrowth("data", "trace", local.folder).returncode == 2


def test_a_removed_near_duplicate_names_what_was_kept_instead(local: Corpus) -> None:
    import pyarrow as pa

    gone = {}
    for path in (local.folder / "dropped").glob("*.arrow"):
        for row in pa.ipc.open_stream(pa.memory_map(str(path))).read_all().to_pylist():
            gone[row["transform"], row["reason"]] = row["id"]
    told = regrowth("data", "trace", local.folder, gone["minhash_dedup", "near_duplicate"]).stdout
    keeper = re.search(r"removed in favour of ([0-9a-f]{32}) from a cluster of 2", told)
    assert keeper and "dropped by minhash_dedup: near_duplicate" in told
    assert "minhash_dedup: kept for a cluster of 2" in regrowth("data", "trace", local.folder, keeper[1]).stdout
    told = regrowth("data", "trace", local.folder, gone["exact_dedup", "duplicate"]).stdout
    assert re.search(r"exact_dedup: removed in favour of [0-9a-f]{32} from its copies", told)
    assert (
        "dropped by gopher_repetition: top_2_gram"
        in regrowth("data", "trace", local.folder, gone["gopher_repetition", "top_2_gram"]).stdout
    )
    sums = regrowth("data", "trace", local.folder, "--source", "/").stdout
    assert "122 documents" in sums and "1  minhash_dedup: near_duplicate" in sums


def test_stats_count_every_token_and_draw_a_page(local: Corpus, tmp_path: Path) -> None:
    done = regrowth("data", "stats", local.folder, "--html", tmp_path / "s.html")
    tokens = sum(local.tokens("train", domain) for domain in local.domains)
    assert f"{tokens:,} tokens" in done.stdout and "document lengths" in done.stdout
    page = (tmp_path / "s.html").read_text()
    assert f"{tokens:,} tokens" in page and page.count("<table>") == 4 and "Tokens by level" in page


def test_a_shard_is_inspected_merged_split_verified_and_exported(local: Corpus, tmp_path: Path) -> None:
    shards = [local.folder / row["path"] for row in local.manifest["splits"]["train"]["a"]]
    assert len(shards) > 1, "several shards"
    shown = regrowth("data", "inspect", shards[0], "--sample", "1").stdout
    assert "domain" in shown and "-> normalise@1 -> mask_pii@1" in shown.replace("\n", " ")
    assert regrowth("data", "merge", tmp_path / "merged", *shards).returncode == 0
    whole = tmp_path / "merged/00000-000.arrow"
    assert f"{local.tokens('train', 'a'):,} tokens" in regrowth("data", "verify", whole).stdout
    assert regrowth("data", "split", whole, tmp_path / "parts", "--parts", "3", "--block-tokens", "1024").returncode == 0
    parts = sorted((tmp_path / "parts").glob("*.arrow"))
    assert len(parts) == 3 and all(regrowth("data", "verify", part).returncode == 0 for part in parts)
    import pyarrow as pa

    def ids(paths: list[Path]) -> list[str]:
        return [i for p in paths for i in pa.ipc.open_stream(pa.memory_map(str(p))).read_all()["id"].to_pylist()]

    assert ids(parts) == ids([whole]) == ids(shards)
    other = local.folder / local.manifest["splits"]["train"]["b"][0]["path"]
    assert "only shards of one domain" in one_letter(regrowth("data", "merge", tmp_path / "no", shards[0], other).stderr)
    assert "exists already" in one_letter(regrowth("data", "merge", tmp_path / "merged", *shards).stderr)
    assert regrowth("data", "export", local.folder, tmp_path / "megatron").returncode == 0
    assert (tmp_path / "megatron/train/a.bin").stat().st_size == 2 * local.tokens("train", "a")
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(whole.read_bytes()[:-100])
    shutil.copy(whole.with_suffix(".json"), cut.with_suffix(".json"))
    assert "damaged" in one_letter(regrowth("data", "verify", cut).stderr)


def test_a_plan_can_be_opened_from_its_folder_alone(local: Corpus) -> None:
    pipeline = Pipeline.open(local.folder)
    assert pipeline.finished and [phase.settled for phase in pipeline.phases] == [True] * len(pipeline.phases)
