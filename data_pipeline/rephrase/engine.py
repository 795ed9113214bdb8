"""What answers requests, through a cache: servers (`client.py`), or a model in this process (`local_model.py`)."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache, request_key
from regrowth.errors import RunFailed, Stopped

Report = Callable[[int], None]
WORKING: "weakref.WeakSet[Engine]" = weakref.WeakSet()  # that there are in this process; what is to end it asks them first


@dataclass(frozen=True)
class Request:
    """What is asked: a chat completion's payload without the model, and marks that make it this request (the document's id, the prompt's version)."""

    payload: dict[str, Any]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ticket:
    """Requests that were begun."""

    keys: list[str]
    found: dict[str, Answer]  # what the cache had


class Engine:
    """Base of what answers. To be used by one thread. Requests are begun and later finished, so that the next ones are under way while the last of the former are waited for.

    Args:
        model: its name; another model's answers are others.
        extra: what is sent beside a prompt's own settings.
        budget_tokens: that all answers of the cache may have cost together; None for any number.
        retry_errors: whether requests whose error was recorded are made again.
    """

    def __init__(
        self,
        model: str,
        cache: RequestCache,
        budget_tokens: int | None = None,
        retry_errors: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.cache, self.budget_tokens, self.retry_errors, self.extra = model, cache, budget_tokens, retry_errors, extra or {}
        self.recorded = 0  # answers that this process has paid for and kept
        self._ended: str | None = None
        self.waited_for = False  # whether `finish` is under way
        WORKING.add(self)

    def payload(self, request: Request) -> dict[str, Any]:
        """All that is sent. A setting of `extra` that is None takes one of the prompt's away."""
        sent = {"model": self.model, **request.payload, **self.extra}
        return {key: value for key, value in sent.items() if value is not None}

    def key(self, request: Request) -> str:
        """Under which its answer is kept."""
        return request_key(self.payload(request), *request.marks)

    def begin(self, requests: Sequence[Request]) -> Ticket:
        """Take requests up; those whose answers the cache has cost nothing."""
        keys = [self.key(request) for request in requests]
        found = {key: answer for key, answer in self.cache.find(keys).items() if not (answer.error and self.retry_errors)}
        self._take_up({key: request for key, request in zip(keys, requests, strict=True) if key not in found})
        return Ticket(keys, found)

    def finish(self, ticket: Ticket, report: Report = lambda done: None) -> list[Answer]:
        """The answers, in order.

        Args:
            report: told how many have come by now.

        Raises:
            UserError: what no repetition mends: the key, the address, the model.
            RunFailed: nothing answers, or the budget is used up. What was answered is kept.
            Stopped: an end was asked for.
        """
        open_ = {key for key in ticket.keys if key not in ticket.found}
        had = len(ticket.keys) - len(open_)
        report(had)
        self.waited_for = True
        try:
            answers = {**ticket.found, **self._wait_for(open_, lambda done: report(had + done))} if open_ else ticket.found
        finally:
            self.waited_for = False
        return [answers[key] for key in ticket.keys]

    def answers(self, requests: Sequence[Request], report: Report = lambda done: None) -> list[Answer]:
        """Begun and finished."""
        return self.finish(self.begin(requests), report)

    @property
    def is_busy(self) -> bool:
        """Whether answers are waited for."""
        return self.waited_for

    def end_soon(self, why: str) -> None:
        """Ask for nothing more and keep what is under way; whoever waits is told `why`. May be called by a signal's handler."""
        self._ended = why

    def close(self) -> None:
        """Let go of connections, processes and memory."""

    def abandon(self) -> None:
        """End what this process has started, at once: it is about to end itself. May be called by a signal's handler."""

    def _take_up(self, requests: dict[str, Request]) -> None:
        raise NotImplementedError

    def _wait_for(self, keys: set[str], report: Report) -> dict[str, Answer]:
        raise NotImplementedError

    def _record(self, answers: Iterable[tuple[str, Answer]]) -> None:
        some = list(answers)
        self.cache.store(some)
        self.recorded += len(some)

    def _refuse_more(self, spent: int) -> None:
        """Before each request: whether there is to be one.

        Raises:
            RunFailed: the budget is used up.
            Stopped: an end was asked for.
        """
        if self._ended is not None:
            raise Stopped(self._ended)
        if self.budget_tokens is not None and spent >= self.budget_tokens:
            raise RunFailed(f"the budget of {self.budget_tokens:,} tokens is used up ({spent:,} in {self.cache.path}). What was answered is kept; "
                            "raise budget_tokens of the transform (or --budget-tokens) to go on.")  # fmt: skip
