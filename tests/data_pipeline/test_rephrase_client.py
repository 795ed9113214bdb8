"""The client of language models: each request is answered once and paid once, whatever servers, networks and people with kill -9 do."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache
from regrowth.data_pipeline.rephrase.client import Client
from regrowth.data_pipeline.rephrase.config import ServerConfig
from regrowth.data_pipeline.rephrase.engine import Request
from regrowth.data_pipeline.rephrase.limit import AdaptiveLimit
from regrowth.errors import RunFailed, Stopped, UserError

pytest.importorskip("aiohttp", reason="the extra rephrase is not installed")

from tests.data_pipeline.rephrase_server import answer_to

PROGRAM = Path(__file__).with_name("rephrase_server.py")
AT_ONCE = 16


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answered(self) -> Counter[str]:
        """How often each message was answered well."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(json.loads(line)["message"] for line in lines)


@contextmanager
def server(folder: Path, *options: str, port: int = 0) -> Iterator[Running]:
    folder.mkdir(exist_ok=True)
    log = folder / "answered.jsonl"
    command = [sys.executable, str(PROGRAM), "--log", str(log), "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Running(process, int(process.stdout.readline()), log)
        finally:
            process.kill()


def requests(count: int) -> list[Request]:
    return [
        Request({"messages": [{"role": "user", "content": f"document {i} of some length"}]}, (f"id-{i}", "easy@1")) for i in range(count)
    ]


def expected(count: int) -> list[str]:
    return [answer_to(f"document {i} of some length") for i in range(count)]


def client(folder: Path, *urls: str, budget: int | None = None, retry_errors: bool = False, **settings: Any) -> Client:
    quick = {"timeout_seconds": 60.0, "first_wait_seconds": 0.02, "first_in_flight": AT_ONCE, "max_in_flight": AT_ONCE}
    config = ServerConfig.model_validate({"urls": list(urls), "model": "small", **quick, **settings})
    return Client(config, RequestCache(folder / "cache.sqlite"), budget, retry_errors)


def test_each_request_is_answered_and_paid_once_whatever_the_server_does(tmp_path: Path) -> None:
    with server(tmp_path, "--faults", "0.3", "--seed", "3") as running:
        told: list[int] = []
        asking = client(tmp_path, running.url, timeout_seconds=3.0)
        answers = asking.answers(requests(150), told.append)
        assert [answer.text for answer in answers] == expected(150) and told == sorted(told) and told[-1] == 150
        paid, late = running.answered(), asking.retries.get("no answer within 3 s", 0)
        assert len(paid) == 150 and sum(paid.values()) - 150 <= late, "twice only what came too late"
        assert max(answer.attempts for answer in answers) > 1
        kinds = " ".join(asking.retries)
        for kind in (
            "status 500",
            "no answer within 3 s",
            "the connection broke",
            "an answer that is none",
            'answered by the model "another"',
        ):
            assert kind in kinds
        assert asking.answers(requests(150)) == answers and running.answered() == paid
        asking.close()


def kill_at_random(folder: Path, documents: int, kills: int, seed: int) -> None:
    """A process that asks for everything is killed and started again; then it is let be."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.data_pipeline.test_rephrase_client import client, requests
c = client(Path(sys.argv[1]), sys.argv[2], timeout_seconds=5.0)
print(len([a for a in c.answers(requests(int(sys.argv[3]))) if a.text]), flush=True)
"""
    chance = random.Random(seed)
    with server(folder, "--faults", "0.1", "--seconds", "0.02", "--seed", str(seed)) as running:
        command = [sys.executable, "-c", code, str(folder), running.url, str(documents)]
        for kill in range(kills):
            before, goal = len(running.answered()), documents * (kill + chance.random()) / kills
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                while process.poll() is None and len(running.answered()) < max(goal, before + 1):
                    time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
            assert sqlite3.connect(folder / "cache.sqlite").execute("pragma integrity_check").fetchone() == ("ok",)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == str(documents), done.stderr
        answered = running.answered()
    assert len(answered) == documents
    # What was under way at a kill has to be asked again: the server had answered, and nobody was there to hear it.
    assert sum(answered.values()) - documents <= kills * AT_ONCE
    rows = (
        sqlite3.connect(folder / "cache.sqlite").execute("select count(*), count(distinct key), sum(error != '') from answers").fetchone()
    )
    assert rows == (documents, documents, 0)


def test_a_killed_process_pays_nothing_twice(tmp_path: Path) -> None:
    kill_at_random(tmp_path, documents=200, kills=3, seed=1)


@pytest.mark.slow
def test_two_thousand_documents_and_twelve_kills(tmp_path: Path) -> None:
    kill_at_random(tmp_path, documents=2000, kills=12, seed=2)


def test_a_server_that_goes_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    with server(tmp_path, "--seconds", "0.05") as running:
        asking = client(tmp_path, running.url)

        def lose(done: int) -> None:
            if done >= 20 and running.process.poll() is None:
                running.process.kill()
                running.process.wait()
                again.append(subprocess.Popen([sys.executable, str(PROGRAM), "--port", str(running.port)], stdout=subprocess.DEVNULL))

        again: list[subprocess.Popen[bytes]] = []
        try:
            answers = asking.answers(requests(80), lose)
        finally:
            for process in again:
                process.kill()
                process.wait()
        assert [answer.text for answer in answers] == expected(80) and again
        asking.close()


def test_a_dead_server_leaves_the_work_to_the_others_and_none_at_all_is_told(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        asking = client(tmp_path, "http://127.0.0.1:9/v1", running.url)
        assert [answer.text for answer in asking.answers(requests(40))] == expected(40)
        asking.close()
    nobody = client(tmp_path / "other", "http://127.0.0.1:9/v1", give_up_seconds=1.0)
    with pytest.raises(
        RunFailed,
        match=r"no server has answered for .* s \(http://127\.0\.0\.1:9/v1: no connection \(.*failed.*\)\)\. What was answered is kept",
    ):
        nobody.answers(requests(3))
    assert nobody.cache.spent() == (0, 0)
    nobody.close()


def test_keys_are_read_from_the_environment_and_told_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(tmp_path, "--key", "right") as running:
        for key, told in (
            ("", '"THE_KEY": this environment variable is not set'),
            ("wr0ng-key", "refuses the key .401; the key is in the environment variable THE_KEY.*no such key: Bearer \\*\\*\\*"),
        ):
            monkeypatch.setenv("THE_KEY", key)
            asking = client(tmp_path, running.url, key_env="THE_KEY")
            with pytest.raises(UserError, match=told) as error:
                asking.answers(requests(3))
            assert "wr0ng-key" not in str(error.value)
            asking.close()
        monkeypatch.setenv("THE_KEY", "right")
        asking = client(tmp_path, running.url, key_env="THE_KEY")
        assert asking.answers(requests(1))[0].text == expected(1)[0]
        asking.close()
    assert b"right" not in (tmp_path / "cache.sqlite").read_bytes()


def test_what_is_refused_is_recorded_and_not_asked_again_unless_told_to(tmp_path: Path) -> None:
    long = Request({"messages": [{"role": "user", "content": "TOO LONG"}]})
    with server(tmp_path) as running:
        first = client(tmp_path, running.url)
        (refused,) = first.answers([long])
        assert (
            refused.error.startswith("status 400")
            and "maximum context length" in refused.error
            and not refused.transient
            and refused.attempts == 1
        )
        first.close()
    again = client(tmp_path, "http://127.0.0.1:9/v1", give_up_seconds=1.0)
    assert again.answers([long]) == [refused], "nobody is there, and nobody is asked"
    again.close()
    insisting = client(tmp_path, "http://127.0.0.1:9/v1", give_up_seconds=1.0, retry_errors=True)
    with pytest.raises(RunFailed):
        insisting.answers([long])
    insisting.close()


def test_a_request_that_fails_too_often_is_recorded_with_its_attempts(tmp_path: Path) -> None:
    with server(tmp_path, "--faults", "1", "--kinds", "500,no_choices", "--only", "document 3 ", "--most-faults", "100") as running:
        asking = client(tmp_path, running.url, attempts=2)
        answers = asking.answers(requests(12))
        asking.close()
    assert [i for i, answer in enumerate(answers) if answer.error] == [3] and answers[3].transient and answers[3].attempts == 2


@pytest.mark.parametrize(
    ("kind", "told"), [("500", "status 500"), ("wrong_model", 'answered by the model "another", not "small"'), ("402", "status 402")]
)
def test_a_service_that_fails_whatever_is_asked_ends_the_run_and_records_nothing(kind: str, told: str, tmp_path: Path) -> None:
    with server(tmp_path, "--faults", "1", "--kinds", kind, "--most-faults", "1000000") as running:
        asking = client(tmp_path, running.url, attempts=2)
        with pytest.raises(RunFailed, match=f"requests in a row have failed .{told}.*do not answer something tiny either"):
            asking.answers(requests(100))
        assert not asking.cache.find([asking.key(request) for request in requests(100)])
        asking.close()
    with server(tmp_path / "well") as running:
        again = client(tmp_path, running.url)
        assert [answer.text for answer in again.answers(requests(100))] == expected(100)
        again.close()


def test_a_model_that_takes_none_of_the_requests_is_told_at_once_and_nothing_is_recorded(tmp_path: Path) -> None:
    long = [Request({"messages": [{"role": "user", "content": f"TOO LONG {i}"}]}) for i in range(40)]
    with server(tmp_path) as running:
        asking = client(tmp_path, running.url)
        with pytest.raises(
            UserError, match=r"each of the first \d+ requests was refused .status 400: .*maximum context(.|\n)*smaller chunk_tokens"
        ):
            asking.answers(long)
        assert not asking.cache.find([asking.key(request) for request in long])
        asking.close()
        used = client(tmp_path, running.url)
        assert used.answers(requests(5))[0].text
        assert {answer.error[:10] for answer in used.answers(long)} == {"status 400"}, (
            "where others are answered, they are the requests' own"
        )
        used.close()


def test_what_is_begun_goes_on_while_something_else_is_done(tmp_path: Path) -> None:
    with server(tmp_path, "--seconds", "0.05") as running:
        asking = client(tmp_path, running.url)
        first, second = asking.begin(requests(30)), asking.begin(requests(60))
        while len(running.answered()) < 60:
            time.sleep(0.02)
        assert [answer.text for answer in asking.finish(first)] == expected(30)
        assert [answer.text for answer in asking.finish(second)] == expected(60)
        assert set(running.answered().values()) == {1}, "what both want is asked once"
        third = asking.begin([Request({"messages": [{"role": "user", "content": f"late {i}"}]}) for i in range(200)])
        asking.end_soon("enough")
        with pytest.raises(Stopped, match="enough"):
            asking.finish(third)
        kept = asking.cache.find(asking.key(Request({"messages": [{"role": "user", "content": f"late {i}"}]})) for i in range(200))
        assert len(kept) == len(running.answered()) - 60, "what was under way has been waited for"
        asking.close()


def test_what_is_under_way_when_something_else_fails_is_kept(tmp_path: Path) -> None:
    with server(tmp_path, "--seconds", "0.4") as running:
        asking = client(tmp_path, running.url)
        asking.begin(requests(AT_ONCE))
        while not running.log.parent.exists() or asking._endpoints == [] or asking._endpoints[0].in_flight < AT_ONCE:
            time.sleep(0.01)
        assert asking.is_busy
        asking.close()  # a disk is full, say, where the documents are written
        assert asking.recorded == AT_ONCE and len(running.answered()) == AT_ONCE
        again = client(tmp_path, "http://127.0.0.1:9/v1")
        assert [answer.text for answer in again.answers(requests(AT_ONCE))] == expected(AT_ONCE)


def test_a_client_that_could_not_begin_says_the_same_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    asking = client(tmp_path, "http://127.0.0.1:9/v1", key_env="THE_KEY")
    for _ in range(2):
        with pytest.raises(UserError, match='"THE_KEY": this environment variable is not set'):
            asking.answers(requests(2))
    asking.close()


def test_log_probabilities_that_are_asked_for_and_not_given_are_told(tmp_path: Path) -> None:
    """Some servers leave them out without a word (`transformers serve`)."""
    with server(tmp_path) as running:
        asking = client(tmp_path, running.url)
        with pytest.raises(UserError, match="was asked for log-probabilities and gives none"):
            asking.answers([Request({"messages": [{"role": "user", "content": "document 1 of some length"}], "logprobs": True})])
        asking.close()


def test_a_text_that_is_hardly_text_is_sent_whole_and_answered(tmp_path: Path) -> None:
    odd = ["\x00\x01\x02 null bytes", "half a pair \ud800 of surrogates", "\u202e backwards", "\ufeff mark", "{text} {model} %s \\n"]
    with server(tmp_path) as running:
        asking = client(tmp_path, running.url)
        answers = asking.answers([Request({"messages": [{"role": "user", "content": text}]}) for text in odd])
        assert all(answer.text.startswith("In other words:") for answer in answers)
        assert answers[1].text.endswith("of \ufffd pair a half"), "half a pair is no text"
        again = client(tmp_path, "http://127.0.0.1:9/v1")
        assert again.answers([Request({"messages": [{"role": "user", "content": text}]}) for text in odd]) == answers
        asking.close()


def test_settings_of_the_server_go_with_every_request_and_make_it_another(tmp_path: Path) -> None:
    plain, more = client(tmp_path, "http://a/v1"), client(tmp_path, "http://a/v1", extra={"seed": 3, "max_tokens": None})
    request = Request({"messages": [], "max_tokens": 5})
    assert more.payload(request) == {"model": "small", "messages": [], "seed": 3} and plain.payload(request) == {
        "model": "small",
        "messages": [],
        "max_tokens": 5,
    }
    assert plain.key(request) != more.key(request)


def test_a_budget_ends_the_asking_and_what_was_paid_is_kept(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        asking = client(tmp_path, running.url, budget=100)
        with pytest.raises(RunFailed, match="the budget of 100 tokens is used up"):
            asking.answers(requests(100))
        spent = sum(asking.cache.spent())
        assert 100 <= spent <= 100 + AT_ONCE * 13 and len(running.answered()) == spent // 13
        asking.close()
        richer = client(tmp_path, running.url, budget=10_000)
        assert [answer.text for answer in richer.answers(requests(100))] == expected(100)
        assert set(running.answered().values()) == {1}
        richer.close()


@pytest.mark.parametrize(("first", "places"), [(4, 40), (8, 32), (8, 500), (64, 3)])
def test_the_limit_finds_what_a_server_can_take(first: int, places: int) -> None:
    """Simulated: a server of so many places, each of which takes a second an answer, and of which the others wait."""
    limit = AdaptiveLimit(first, 1000)

    def answer() -> None:
        limit.answered(max(1.0, limit.limit / places), limit.limit)

    seen = []
    for _ in range(60_000):
        answer()
        seen.append(limit.limit)
    settled = seen[20_000:]
    # Doubling from `first` may settle at just under twice what is needed; higher tries, one window in twenty, may take half as much again.
    assert (
        all(min(places, first) <= its <= max(3 * places, 2 * first) for its in settled)
        and sorted(settled)[len(settled) // 2] >= 0.94 * places
    )
    for _ in range(1000):
        limit.complained()
    assert limit.limit == 1
    for _ in range(60_000):
        answer()
    assert limit.limit >= 0.75 * places, "it rises again when the server is well"


def test_what_is_no_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, but a text that is long enough to be taken for one" * 20)
    with pytest.raises(UserError, match=r"text: not a cache of requests \(file is not a database\)"):
        RequestCache(tmp_path / "text")
    RequestCache(tmp_path / "old").close()
    connection = sqlite3.connect(tmp_path / "old")
    connection.execute("pragma user_version = 9")
    connection.close()
    with pytest.raises(UserError, match="a cache of requests of layout 9"):
        RequestCache(tmp_path / "old")


def test_processes_share_a_cache(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache
cache = RequestCache(Path(sys.argv[1]))
for i in range(100):
    cache.store([(f"{{sys.argv[2]}}-{{i}}", Answer(f"text {{i}}", prompt_tokens=1, completion_tokens=2))])
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cache"), str(n)], env=dict(os.environ)) for n in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    cache = RequestCache(tmp_path / "cache")
    assert cache.spent() == (300, 600) and cache.find(["2-99", "4-1"]) == {"2-99": Answer("text 99", prompt_tokens=1, completion_tokens=2)}
