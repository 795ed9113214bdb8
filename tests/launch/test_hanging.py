"""When ranks count as hanging: by their signs, and by a steady clock that the test turns."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from regrowth.launch.hanging import Hanging
from regrowth.parallel.heartbeat import Heartbeat, beats
from regrowth.pretrain.config import RunConfig
from tests.conftest import small_run_values


class Clock:
    """Stands still until it is turned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def asked_after(hanging: Hanging, clock: Clock, seconds: float) -> str | None:
    clock.now += seconds
    return hanging()


def config(documents: Path, folder: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(small_run_values(documents, folder / "prepared", folder / "runs", **sections))


def step(folder: Path, seconds: float, times: int) -> None:
    with (folder / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps({"seconds": seconds}) + "\n" for _ in range(times))


def test_a_hang_is_five_times_what_steps_take_and_thirty_seconds_at_least(documents: Path, tmp_path: Path, clock: Clock) -> None:
    hanging = Hanging(tmp_path, config(documents, tmp_path))
    heart = Heartbeat(tmp_path / "logs", 0, 1)
    heart.beat(3, "update")
    assert asked_after(hanging, clock, 2) is None
    assert asked_after(hanging, clock, 550) is None, "before there are ten steps, run.timeout_seconds holds"
    step(tmp_path, 1.0, 20)
    heart.beat(4, "update")
    assert asked_after(hanging, clock, 2) is None
    assert asked_after(hanging, clock, 27) is None
    assert "no rank did anything for 29 s, where 28 s are usual" in str(asked_after(hanging, clock, 2))
    step(tmp_path, 100.0, 1000)
    assert asked_after(hanging, clock, 400) is None, "steps take longer now"
    assert "rank 0 on " in str(asked_after(hanging, clock, 100)) and 'step 4, "update"' in str(asked_after(hanging, clock, 1))


def test_growing_may_take_as_long_as_each_process_gives_its_sign_and_the_steps_after_it_are_new(
    documents: Path, tmp_path: Path, clock: Clock
) -> None:
    hanging = Hanging(tmp_path, config(documents, tmp_path))
    grows, waits = (Heartbeat(tmp_path / "logs", rank, 2) for rank in range(2))
    step(tmp_path, 1.0, 20)
    for _ in range(100):  # the thread's signs, by hand
        grows.beat(20, "growth")
        waits.beat(20, "growth")
        assert asked_after(hanging, clock, 50) is None
    grows.close()
    waits.beat(20, "growth")
    assert asked_after(hanging, clock, 30) is None
    waits.beat(20, "growth")
    assert "hung: rank 0 on " in (told := str(asked_after(hanging, clock, 35))) and "rank 1" not in told and "due each second" in told
    grows.beat(20, "forward and backward")
    waits.beat(20, "forward and backward")
    assert asked_after(hanging, clock, 2) is None
    assert asked_after(hanging, clock, 500) is None, "compiled anew"
    assert asked_after(hanging, clock, 200) is not None


def test_a_process_gives_its_sign_each_second_while_it_grows(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 0, 1)
    heart.beat(20, "growth")
    seen = {beats(tmp_path)[0].time}
    until = time.monotonic() + 60
    while len(seen) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
        seen.add(beats(tmp_path)[0].time)
    heart.beat(20, "data")
    last = beats(tmp_path)
    time.sleep(2.5)
    assert beats(tmp_path) == last, "of waiting for data only who waits tells"


def test_signs_of_an_earlier_start_and_a_clock_that_jumps_are_no_hang(
    documents: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    Heartbeat(tmp_path / "logs", 0, 1).beat(7, "update")
    hanging = Hanging(tmp_path, config(documents, tmp_path, supervision={"hang_seconds": 5.0}))
    assert asked_after(hanging, clock, 10_000) is None, "it has not begun yet"
    step(tmp_path, 1.0, 20)
    heart = Heartbeat(tmp_path / "logs", 0, 1)
    for jump in (0.0, 86_400.0, -86_400.0):
        now = time.time() + jump
        monkeypatch.setattr(time, "time", lambda now=now: now)
        heart.beat(8, "update")
        assert asked_after(hanging, clock, 4) is None
    assert asked_after(hanging, clock, 6) is not None
