"""What answers, beside a server that somebody else runs: a model in the process, and servers that the process starts for itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")
pytest.importorskip("aiohttp", reason="the extra rephrase is not installed")

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.rephrase.cache import RequestCache
from regrowth.data_pipeline.rephrase.client import Client
from regrowth.data_pipeline.rephrase.config import LocalModelConfig, ServerConfig
from regrowth.data_pipeline.rephrase.engine import Request
from regrowth.data_pipeline.rephrase.local_model import LocalModel
from regrowth.data_pipeline.rephrase.similarity import SimilarityCheck
from regrowth.data_pipeline.transform_config import Similarity
from regrowth.errors import RunFailed, UserError
from tests.data_pipeline.small_model import build
from tests.data_pipeline.test_rephrase_client import PROGRAM, expected, requests

STYLE = 'name = "any"\ntemplate = "Say otherwise: {text}"\nchunk_tokens = 40\nmax_tokens = 30\ntemperature = 0.9\n[after]\nmin_tokens = 1\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model"))


def ask(words: str, **settings: Any) -> Request:
    return Request(
        {
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": words}],
            "max_tokens": 24,
            "temperature": 0.0,
            **settings,
        },
        (words,),
    )


def test_a_model_in_the_process_answers_in_batches_as_it_would_one_by_one(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [ask("word " * length) for length in (1, 7, 3, 20, 2)]
    config = LocalModelConfig(path=str(model), device="cpu", dtype="float32", batch_requests=4)
    engine = LocalModel(config, RequestCache(tmp_path / "a.sqlite"))
    told: list[int] = []
    answers = engine.answers(asked, told.append)
    assert told[-1] == 5 and engine.recorded == 5
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain: Any = AutoModelForCausalLM.from_pretrained(model)
    for request, answer in zip(asked, answers, strict=True):
        text = tokenizer.apply_chat_template(request.payload["messages"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = plain.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
        ended = int(out[-1]) == 0
        assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
        assert (answer.finish, answer.prompt_tokens, answer.completion_tokens) == ("stop" if ended else "length", prompt.shape[1], len(out))
    first, second = engine.begin([ask("twice")]), engine.begin([ask("twice")])
    assert engine.finish(first) == engine.finish(second)
    again = LocalModel(config.model_copy(update={"device": "nowhere"}), RequestCache(tmp_path / "a.sqlite"))
    assert again.answers(asked) == answers, "and costs nothing the second time, not even the loading"


def test_what_a_model_in_the_process_cannot_do_is_told(model: Path, tmp_path: Path) -> None:
    engine = LocalModel(LocalModelConfig(path=str(model), device="cpu"), RequestCache(tmp_path / "a.sqlite"), budget_tokens=20)
    long, short = engine.answers([ask("word " * 400), ask("word")])
    assert long.error.startswith("context too small") and not long.transient and not short.error
    with pytest.raises(RunFailed, match="the budget of 20 tokens is used up"):
        engine.answers([ask("another"), ask("and another")])
    with pytest.raises(UserError, match=r"transforms\.local\.path = .*nothing \(no folder of this name is here\)"):
        LocalModel(LocalModelConfig(path=str(tmp_path / "nothing")), RequestCache(tmp_path / "b.sqlite")).answers([ask("word")])
    (tmp_path / "base").mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="has no chat template"):
        LocalModel(LocalModelConfig(path=str(tmp_path / "base")), RequestCache(tmp_path / "b.sqlite")).answers([ask("word")])


def recipe(folder: Path, engine: dict[str, Any], documents: int = 12) -> DataConfig:
    (folder / "in").mkdir(exist_ok=True)
    rows = [{"text": f"The bridge of town {i} burned twice, in 1471 and in 1908, and was built anew each time."} for i in range(documents)]
    (folder / "in/towns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "any.toml").write_text(STYLE)
    transform = {
        "kind": "rephrase",
        **engine,
        "cache": str(folder / "answers.sqlite"),
        "styles": {"any": 1},
        "prompts": str(folder),
        "language": "any",
    }
    values = {"out": str(folder / "out"), "sources": [{"kind": "jsonl", "path": str(folder / "in")}], "workers": 1, "transforms": [transform],
              "tokenizer": {"vocabulary": 300}, "heldout_fraction": 0.2}  # fmt: skip
    return DataConfig.model_validate(values)


@pytest.mark.parametrize("engine", ["local", "server"])
def test_a_corpus_rephrased_by_a_real_model(engine: str, model: Path, tmp_path: Path) -> None:
    """In this process, and by `transformers serve`, which the run starts and stops."""
    if engine == "server":
        for module in ("fastapi", "uvicorn", "openai"):
            pytest.importorskip(module, reason="transformers serve needs it")
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", "{model}", "--port", "{port}", "--device", "cpu"]
    engines: dict[str, Any] = {
        "local": {"path": str(model), "device": "cpu"},
        "server": {
            "model": str(model),
            "start": {"command": serve, "wait_seconds": 300, "env": {"HF_HUB_OFFLINE": "1"}},
            "timeout_seconds": 120,
        },
    }
    corpus = prepare(recipe(tmp_path, {engine: engines[engine]}))
    reasons = {(transform, reason): documents for _, transform, reason, documents, _ in corpus.manifest["funnel"] if reason}
    counts = corpus.manifest["counts"]["rephrase"]
    judged = {name: count for name, count in counts.items() if name.startswith("any: ")}
    assert counts["prompt tokens"] > 0 and counts["completion tokens"] > 0
    assert set(corpus.domains) <= {"towns", "towns_rephrased"} and sum(judged.values()) == 12
    assert sum(count for (transform, _), count in reasons.items() if transform == "rephrase") == 12 - judged.get("any: good", 0)
    assert "any: error" not in judged and "any: rejected" not in judged, "all were answered"
    assert not running(str(model))


def running(words: str) -> list[int]:
    """Processes, this one left out, whose command lines hold some words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if words in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def own(folder: Path, *options: str, **start: Any) -> Client:
    command = [sys.executable, str(PROGRAM), "--port", "{port}", "--log", str(folder / "answered.jsonl"), *options]
    config = {"model": "small", "start": {"command": command, **start}, "first_wait_seconds": 0.02, "give_up_seconds": 60.0}
    return Client(ServerConfig.model_validate(config), RequestCache(folder / "cache.sqlite"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for pid in running(str(tmp_path)):  # what a failed test has left
        os.kill(pid, signal.SIGKILL)


def test_a_server_of_ones_own_is_started_when_it_is_needed_started_again_when_it_dies_and_stopped(folder: Path) -> None:
    asking = own(folder, "--seconds", "0.02")
    assert not running(str(folder)), "nothing has been asked yet"

    def kill(done: int) -> None:
        if done >= 20 and not killed:
            killed.extend(running(str(folder)))
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    answers = asking.answers(requests(80), kill)
    assert [answer.text for answer in answers] == expected(80) and len(killed) == 1
    assert (now := running(str(folder))) and now != killed
    asking.close()
    assert not running(str(folder))
    cached = own(folder)
    assert cached.answers(requests(80)) == answers and not running(str(folder)), "what is in the cache needs no server"
    cached.close()


def test_a_server_that_does_not_start_is_told_with_its_last_words(folder: Path) -> None:
    asking = own(folder, "--seconds", "many")
    with pytest.raises(UserError, match=r"the server ended with 2 before it answered anything(.|\n)*invalid float value: 'many'"):
        asking.answers(requests(3))
    asking.close()
    with pytest.raises(UserError, match="no-such-program cannot be started"):
        none = Client(
            ServerConfig.model_validate({"model": "small", "start": {"command": ["no-such-program", "{port}"]}}),
            RequestCache(folder / "b.sqlite"),
        )
        none.answers(requests(1))
    slow = own(folder, "--faults", "1", "--kinds", "500", "--most-faults", "1000000", wait_seconds=2.0)
    with pytest.raises(RunFailed, match=r"has not answered anything for 2 s \(status 500\)"):
        slow.answers(requests(3))
    assert not running(str(folder))
    dying = own(folder, "--seconds", "0.02", starts=2)

    goals = [20, 200]

    def kill(done: int) -> None:
        if goals and done >= goals[0]:
            goals.pop(0)
            for pid in running(str(folder)):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(RunFailed, match="the server ended 2 times"):
        dying.answers(requests(500), kill)
    dying.close()


def test_a_server_does_not_outlive_the_process_that_started_it(folder: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.data_pipeline.test_rephrase_engines import own
from tests.data_pipeline.test_rephrase_client import requests
own(Path(sys.argv[1]), "--seconds", "30").answers(requests(1))
"""
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL) as process:
        while not [pid for pid in running(str(PROGRAM)) if pid in running(str(folder))]:
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    for _ in range(100):
        if not running(str(PROGRAM)) or not set(running(str(PROGRAM))) & set(running(str(folder))):
            return
        time.sleep(0.1)
    raise AssertionError("it is there still")


def test_likeness_is_the_cosine_of_means_or_the_chance_of_entailment(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, LlamaModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = [("a bridge of wood", "a bridge of wood"), ("a bridge of wood", "quite another thing, and longer"), ("fire", "water")]
    check = SimilarityCheck(Similarity(path=str(model), least=0.5, device="cpu"))
    plain = LlamaModel.from_pretrained(model).eval()

    def mean(text: str) -> torch.Tensor:
        return plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    with torch.no_grad():
        wanted = [float(torch.cosine_similarity(mean(a), mean(b), dim=0)) for a, b in pairs]
    assert check.scores(pairs) == pytest.approx(wanted, abs=1e-4) and wanted[0] == pytest.approx(1) and check.scores([]) == []
    config = LlamaConfig.from_pretrained(model, num_labels=3, id2label={0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}, pad_token_id=0)
    torch.manual_seed(1)
    judge = LlamaForSequenceClassification(config).eval()
    judge.save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    with torch.no_grad():
        wanted = [float(judge(**tokenizer(a, b, return_tensors="pt")).logits.softmax(-1)[0, 2]) for a, b in pairs]
    found = SimilarityCheck(Similarity(path=str(tmp_path / "nli"), kind="entailment", least=0.5, device="cpu")).scores(pairs)
    assert found == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(UserError, match=r"none of its labels .* is entailment"):
        LlamaForSequenceClassification(LlamaConfig.from_pretrained(model)).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        SimilarityCheck(Similarity(path=str(tmp_path / "other"), kind="entailment", least=0.5))
    # In a recipe: what is less alike than asked for is dropped for it.
    made = recipe(tmp_path, {"local": {"path": str(model), "device": "cpu"}})
    # It ends one answer of a hundred tokens by chance: leave it the time to, or all may be cut off, as happened.
    (tmp_path / "any.toml").write_text(STYLE.replace("max_tokens = 30", "max_tokens = 380"))
    transform = made.transforms[0].model_copy(update={"similarity": Similarity(path=str(model), least=1.1, device="cpu")})
    corpus = prepare(made.model_copy(update={"transforms": [transform]}))
    counts = corpus.manifest["counts"]["rephrase"]
    assert "any: good" not in counts and counts["any: drifted"] > 0, counts


def test_several_local_workers_do_not_load_a_model_each(model: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, {"local": {"path": str(model)}}).model_copy(update={"workers": 2})
    with pytest.raises(UserError, match=r"data\.workers = 2: each of them would load a model of its own"):
        prepare(config)
