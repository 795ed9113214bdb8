"""Many requests to a few servers: as many at once as they take, again where it may help, and none that was answered before."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache, request_key
from regrowth.data_pipeline.rephrase.config import ServerConfig
from regrowth.data_pipeline.rephrase.endpoint import Endpoint, Refused, Retry
from regrowth.data_pipeline.rephrase.limit import AdaptiveLimit
from regrowth.errors import RunFailed, need

_LONGEST_WAIT_SECONDS = 60.0
_LOOK_FOR_LOST_SECONDS = 2.0
_CONNECT_SECONDS = 30.0
_DOUBTFUL = 8  # failures without an answer between them, at which a server has to prove that it answers anything at all


@dataclass(frozen=True)
class Request:
    """What is asked: a chat completion's payload without the model, and marks that make it this request (the document's id, the prompt's version)."""

    payload: dict[str, Any]
    marks: tuple[str, ...] = ()


class Client:
    """Asks servers through a cache. To be used by one thread; it keeps its connections from one call to the next.

    Args:
        budget_tokens: that all answers of the cache may have cost together; None for any number.
        retry_errors: whether requests whose error was recorded are made again.
    """

    def __init__(self, config: ServerConfig, cache: RequestCache, budget_tokens: int | None = None, retry_errors: bool = False) -> None:
        self.config, self.cache, self.budget_tokens, self.retry_errors = config, cache, budget_tokens, retry_errors
        self.limit = AdaptiveLimit(config.first_in_flight, config.max_in_flight)
        self.retries: dict[str, int] = {}  # how often, by reason
        self._loop = asyncio.new_event_loop()
        self._session: Any = None
        self._endpoints: list[Endpoint] = []
        self._random = random.Random()

    def key(self, request: Request) -> str:
        """Under which its answer is kept."""
        return request_key({"model": self.config.model, **request.payload}, *request.marks)

    def answers(self, requests: Sequence[Request], report: Callable[[int], None] = lambda done: None) -> list[Answer]:
        """The answers, in order; those that the cache has cost nothing.

        Args:
            report: told how many have come by now.

        Raises:
            UserError: the key, the address or the model is wrong.
            RunFailed: no server has answered for `give_up_seconds`, or the budget is used up. What was answered is kept.
        """
        keys = [self.key(request) for request in requests]
        found = {key: answer for key, answer in self.cache.find(keys).items() if not (answer.error and self.retry_errors)}
        open_ = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        report(len(keys) - len(open_))
        if open_:
            found |= self._loop.run_until_complete(self._ask_all(open_, lambda done: report(len(keys) - len(open_) + done)))
        return [found[key] for key in keys]

    def close(self) -> None:
        """End the connections."""
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()

    async def _open(self) -> None:
        aiohttp = need("aiohttp", "rephrasing by a server")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_seconds, sock_connect=_CONNECT_SECONDS),
        )
        self._endpoints = [Endpoint(url, self.config, self._session) for url in self.config.urls]

    async def _ask_all(self, requests: dict[str, Request], report: Callable[[int], None]) -> dict[str, Answer]:
        if self._session is None:
            await self._open()
        run = _Run(self, iter(requests.items()), report)
        await run.to_the_end()
        return run.answers

    def _endpoint(self) -> Endpoint | None:
        """The one with the least to do, of those that are not lost."""
        well = [endpoint for endpoint in self._endpoints if endpoint.lost_since is None]
        return min(well, key=lambda endpoint: endpoint.in_flight) if well else None


class _Run:
    """One call: workers as many as the limit says, each with one request at a time; answers are written together, before anyone hears of them."""

    def __init__(self, client: Client, requests: Iterator[tuple[str, Request]], report: Callable[[int], None]) -> None:
        self.client, self.requests, self.report = client, requests, report
        self.answers: dict[str, Answer] = {}
        self._unwritten: list[tuple[str, Answer]] = []
        self._workers: set[asyncio.Task[None]] = set()
        self._exhausted = False
        self._doubtful: list[tuple[str, Answer]] = []  # failures since the last answer: the requests', or the servers'?
        self._failure: BaseException | None = None  # why no more is asked; what is under way is still waited for, for it is paid
        self._spent = sum(client.cache.spent()) if client.budget_tokens is not None else 0

    async def to_the_end(self) -> None:
        """Until all requests are answered, or something says that the rest will not be."""
        searcher = asyncio.create_task(self._look_for_the_lost())
        try:
            self._hire()
            while self._workers:
                watched = self._workers if searcher.done() else {*self._workers, searcher}
                done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                self._workers -= done
                for task in done:
                    if (error := task.exception()) is not None:
                        self._fail(error)
                self._hire()
                if not self._workers and self._failure is None:
                    await self._settle_doubts()
        finally:
            for task in (*self._workers, searcher):
                task.cancel()
            await asyncio.gather(*self._workers, searcher, return_exceptions=True)
            self._write()
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._exhausted = True

    def _hire(self) -> None:
        while not self._exhausted and len(self._workers) < self.client.limit.limit:
            self._workers.add(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        limit = self.client.limit
        while not self._exhausted and len(self._workers) <= limit.limit:
            following = next(self.requests, None)
            if following is None:
                self._exhausted = True
                return
            self._refuse_past_the_budget()
            key, request = following
            answer = await self._answer(request)
            if answer is None:
                return
            if answer.error:
                self._doubtful.append((key, answer))
                if len(self._doubtful) >= _DOUBTFUL:
                    await self._settle_doubts()
                continue
            for failed in self._drained():
                self._take(*failed)
            self._take(key, answer)
            if len(self._workers) < limit.limit:
                self._hire()

    def _drained(self) -> list[tuple[str, Answer]]:
        drained, self._doubtful = self._doubtful, []
        return drained

    async def _settle_doubts(self) -> None:
        """Record failures if a server answers something tiny: then they are the requests' own. Else nothing is recorded, and the run fails.

        Raises:
            RunFailed: whatever is asked, nothing good comes of it.
        """
        if not (doubtful := self._drained()):
            return
        well = [endpoint for endpoint in self.client._endpoints if endpoint.lost_since is None]
        faults = await asyncio.gather(*(endpoint.trial() for endpoint in well))
        if well and not any(fault is None for fault in faults):
            told = "; ".join(f"{endpoint.url}: {fault}" for endpoint, fault in zip(well, faults, strict=True))
            raise RunFailed(f"server.urls: {len(doubtful)} requests in a row have failed ({doubtful[-1][1].error}), and the servers do not answer something tiny either "
                            f"({told}). What was answered is kept; mend the server and run the same again.")  # fmt: skip
        for failed in doubtful:
            self._take(*failed)

    def _refuse_past_the_budget(self) -> None:
        budget = self.client.budget_tokens
        if budget is not None and self._spent >= budget:
            raise RunFailed(f"the budget of {budget:,} tokens is used up ({self._spent:,} in {self.client.cache.path}). What was answered is kept; "
                            "raise budget_tokens of the transform to go on.")  # fmt: skip

    async def _answer(self, request: Request) -> Answer | None:
        """What comes of a request after all its attempts; None if the run has failed meanwhile."""
        client, payload = self.client, {"model": self.client.config.model, **request.payload}
        attempt, doublings, begin = 0, 0, time.monotonic()
        prompt = completion = 0  # paid for what was none
        while True:
            while (endpoint := client._endpoint()) is None and self._failure is None:
                await asyncio.sleep(_LOOK_FOR_LOST_SECONDS / 4)
            if endpoint is None or (self._failure is not None and attempt):
                return None
            attempt += 1
            try:
                answer = await endpoint.ask(payload)
            except Refused as refused:
                client.limit.answered()
                return Answer(error=str(refused), attempts=attempt, prompt_tokens=prompt, completion_tokens=completion)
            except Retry as again:
                client.retries[str(again)] = client.retries.get(str(again), 0) + 1
                prompt, completion = prompt + again.tokens[0], completion + again.tokens[1]
                if again.overloaded:
                    client.limit.complained()
                if again.lost:
                    endpoint.lost_since = endpoint.lost_since or time.monotonic()
                    attempt -= 1  # it was not even asked
                    continue
                if again.busy and time.monotonic() - begin < client.config.give_up_seconds:
                    attempt -= 1
                if attempt >= client.config.attempts:
                    return Answer(error=str(again), transient=True, attempts=attempt, prompt_tokens=prompt, completion_tokens=completion)
                wait = min(client.config.first_wait_seconds * 2**doublings, _LONGEST_WAIT_SECONDS)
                doublings += 1
                await asyncio.sleep(max(again.wait, wait * client._random.uniform(0.5, 1.5)))
                if self._failure is not None:
                    return None
                continue
            client.limit.answered()
            paid = {"prompt_tokens": prompt + answer.prompt_tokens, "completion_tokens": completion + answer.completion_tokens}
            return replace(answer, attempts=attempt, **paid)

    def _take(self, key: str, answer: Answer) -> None:
        self._spent += answer.prompt_tokens + answer.completion_tokens
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._write)
        self._unwritten.append((key, answer))

    def _write(self) -> None:
        """What has come since the loop was last here, in one transaction."""
        if not self._unwritten:
            return
        some, self._unwritten = self._unwritten, []
        try:
            self.client.cache.store(some)
        except Exception as error:  # in a callback of the loop, from where nobody would hear of it
            return self._fail(error)
        self.answers.update(some)
        self.report(len(self.answers))

    async def _look_for_the_lost(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_FOR_LOST_SECONDS)
            endpoints = self.client._endpoints
            await asyncio.gather(*(endpoint.look_again() for endpoint in endpoints if endpoint.lost_since is not None))
            since = [endpoint.lost_since for endpoint in endpoints]
            if all(lost is not None for lost in since):
                away = time.monotonic() - max(lost for lost in since if lost is not None)
                if away > self.client.config.give_up_seconds:
                    told = "; ".join(f"{endpoint.url}: {endpoint.last_words}" for endpoint in endpoints)
                    raise RunFailed(f"server.urls: no server has answered for {away:.0f} s ({told}). What was answered is kept; start the server and run "
                                    "the same again.")  # fmt: skip
