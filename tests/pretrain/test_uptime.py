"""Where a run's time went, from its logs."""

from regrowth.pretrain.report.uptime import uptime

METRICS = [{"step": step, "seconds": 2.0} for step in range(10)]


def event(name: str, time: float, **more: object) -> dict[str, object]:
    return {"event": name, "time": time, **more}


def test_time_is_told_by_what_it_went_on() -> None:
    killed = "run: rank 1 was killed (SIGKILL: out of memory, or by hand)."
    events = [
        event("started", 100.0),
        event("failed", 112.0, reason=killed, lost_seconds=4.0),
        event("resumed", 117.0),
        event("failed", 120.0, reason="run: hung: no rank did anything for 31 s", lost_seconds=2.0),
        event("failed", 121.0, reason=killed, lost_seconds=0.0),  # before it came to a step
        event("resumed", 130.0),
        event("finished", 150.0),
    ]
    told = uptime(METRICS, events)
    assert told is not None
    assert (told.life, told.steps, told.again, told.failures) == (50.0, 20.0, 6.0, 3)
    assert told.down == {"a rank was killed": 5.0 + 9.0, "a rank hung": 1.0}
    assert told.goodput == 20.0 / 50.0


def test_before_the_first_step_and_without_events_there_is_nothing_to_tell() -> None:
    assert uptime([], [event("started", 1.0)]) is None
    assert uptime(METRICS, []) is None


def test_a_clock_that_was_set_back_takes_no_time_away() -> None:
    told = uptime(METRICS, [event("started", 100.0), event("failed", 90.0, reason=""), event("resumed", 80.0), event("finished", 130.0)])
    assert told is not None and told.down == {"a rank failed": 0.0} and told.life == 50.0
