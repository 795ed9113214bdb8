"""Rephrasing as users run it: tried, reckoned, done on this machine and as Slurm tasks with servers of their own, and looked at."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="the extra rephrase is not installed")

from regrowth.data_pipeline.config import ExecutorConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.launch.slurm import ArrayJob, render_array
from tests.data_pipeline.test_rephrase_client import PROGRAM, server
from tests.data_pipeline.test_rephrase_engines import running
from tests.launch.helpers import call, regrowth, start, wait_for
from tests.slurm_cluster import SlurmCluster

RECIPE = """
[data]
out = "{folder}/out"
workers = 1
tokenizer = {{ vocabulary = 300 }}
heldout_fraction = 0.2
[[data.sources]]
kind = "jsonl"
path = "{folder}/in"
[[data.transforms]]
kind = "normalise"
[[data.transforms]]
kind = "exact_dedup"
[[data.transforms]]
kind = "rephrase"
language = "any"
styles = {{ plain = 1 }}
prompts = "{folder}"
cache = "{folder}/answers.sqlite"
[data.transforms.server]
model = "small"
first_wait_seconds = 0.02
{server}
"""
DOCUMENTS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "in").mkdir()
    for name in ("north", "south"):
        rows = [
            {"text": f"The {name} bridge number {i} of this land burned twice and was built anew from wood and stone by the town."}
            for i in range(DOCUMENTS // 2)
        ]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.toml").write_text('name = "plain"\ntemplate = "{text}"\nchunk_tokens = 64\nmax_tokens = 100\n')
    yield tmp_path
    for pid in running(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)


def recipe(folder: Path, settings: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder, server=settings))
    return path


def test_a_recipe_is_reckoned_previewed_run_within_a_budget_and_looked_at(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(folder) as running_server:
        path = recipe(folder, f'urls = ["{running_server.url}"]\nprice = {{ prompt = 1000.0, completion = 2000.0 }}')

        def command(*words: str | Path, fails: int = 0) -> str:
            code, output = call(capsys, monkeypatch, *words)
            assert code == fails and "Traceback" not in output, output
            return " ".join(output.split())

        told = command("data", "rephrase", path, "--estimate", "5")
        # Texts of about 104 bytes are 26 tokens; 2 are the template's, 8 a message's. One item of two is read.
        assert "about 60 documents to rephrase" in told and "plain │ 60" in told
        assert "prompts 2,160 tokens; answers 1,560 if they are as long as their sources, 6,000 at most" in told
        assert "cost 5.28, 14.16 at most" in told and not running_server.answered()
        page = folder / "page.html"
        told = command("data", "rephrase", path, "--preview", "3", "--html", page)
        assert told.count("kept") == 4 and "3 of 3 chunks would be kept" in told and "In other words: town. the by stone" in told
        assert page.read_text().count("<section") == 3 and "In other words: town. the by stone" in page.read_text()
        assert len(running_server.answered()) == 3
        told = command("data", "run", path, "--budget-tokens", "500", fails=1)
        assert "the budget of 500 tokens is used up" in told and "(or --budget-tokens) to go on" in told
        told = command("data", "run", path)
        assert "plain: good 60" in told
        assert set(running_server.answered().values()) == {1} and len(running_server.answered()) == DOCUMENTS
        (corpus,) = (folder / "out").glob("corpus-*")
        for target in (path, corpus):
            told = command("data", "rephrase", target, "--report", "--html", page)
            tokens = running_server.answered()
            prompts = sum(len(message.split()) for message in tokens)
            assert (
                f"{prompts:,} tokens of prompts, {prompts + 3 * DOCUMENTS:,} of answers, cost {(prompts + 2 * (prompts + 3 * DOCUMENTS)) / 1000:,.2f}"
                in told
            )
            assert "plain │ 60 │ 100.0%" in told
        # The server says the words backwards: all begin alike, and end alike.
        assert (
            "plain: 60 documents; 2% distinct openings" in told
            and "in other words │ 100.0%" in told
            and "in more than 20% of the documents" in told
        )
        assert page.read_text().count("100.0%") >= 2
        assert "tokens are answered in" in command("data", "status", corpus)
        assert "one of --preview N, --estimate N and --report" in command("data", "rephrase", path, fails=2)
        told = command("data", "rephrase", path, "data.transforms=[{kind='normalise'}]", "--preview", "1", fails=2)
        assert 'none of them is of the kind "rephrase"' in told


def test_gpus_are_asked_for_where_they_are_used(folder: Path) -> None:
    path = recipe(folder, f'start = {{ command = ["{sys.executable}", "{PROGRAM}", "--port", "{{port}}"] }}')
    done = regrowth("data", "run", path, "--executor", "slurm", "--print", "data.executor.gpus_per_task=4")
    scripts = [script for script in done.stdout.split("#!/bin/bash") if script.strip()]
    assert len(scripts) == 6, done.stderr
    asked = ["--gpus-per-node=4" in script for script in scripts]
    assert asked == [False, False, True, False, False, False], "the second segment alone rephrases"
    assert "--gpus" not in render_array(ArrayJob("x", folder, 0, 2), ExecutorConfig(gpus_per_task=4)), "and only where the job says so"


@pytest.mark.slow
def test_slurm_tasks_start_their_own_servers_and_a_preempted_one_loses_no_answer(cluster: SlurmCluster, folder: Path) -> None:
    log = folder / "answered.jsonl"
    words = [sys.executable, str(PROGRAM), "--port", "{port}", "--log", str(log), "--seconds", "0.4", "--places", "2"]
    path = recipe(folder, f"start = {{ command = {json.dumps(words)} }}\nmax_in_flight = 4")
    options = ["data.executor.minutes=5", "data.executor.partition=ci", "data.workers=2", "data.item_megabytes=0.004"]
    process = start("data", "run", path, "--executor", "slurm", "--wait", *options)

    def answered() -> Counter[str]:
        return Counter(json.loads(line)["message"] for line in log.read_text().splitlines()) if log.exists() else Counter()

    wait_for(lambda: len(answered()) >= 8, process)
    assert len({pid for pid in running(str(PROGRAM)) if pid in running(str(log))}) >= 1
    (corpus,) = (folder / "out").glob("corpus-*")
    (job,) = (row["id"] for row in json.loads((corpus / "slurm/jobs.json").read_text()) if row["phase"].startswith("2-"))
    subprocess.run(["scancel", "--signal=TERM", "--batch", f"{job}_0"], check=True, timeout=60)  # what comes before a node is taken away
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    made = Corpus.open(corpus)
    assert made.manifest["counts"]["rephrase"]["plain: good"] == DOCUMENTS
    asked = answered()
    assert asked.pop("Say yes.") == 3, "the task that was put back had a server of its own, as its first round and the other task"
    assert len(asked) == DOCUMENTS and set(asked.values()) == {1}, "what was under way was waited for"
    assert not running(str(log))
