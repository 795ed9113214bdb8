"""Many requests to a few servers: as many at once as they take, again where it may help, and none that was answered before."""

import asyncio
import collections
import random
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from regrowth.data_pipeline.rephrase.cache import Answer, RequestCache
from regrowth.data_pipeline.rephrase.config import ServerConfig
from regrowth.data_pipeline.rephrase.endpoint import Endpoint, Refused, Retry
from regrowth.data_pipeline.rephrase.engine import Engine, Report, Request
from regrowth.data_pipeline.rephrase.limit import AdaptiveLimit
from regrowth.data_pipeline.rephrase.own_server import OwnServer
from regrowth.errors import RunFailed, Stopped, UserError, need

_LONGEST_WAIT_SECONDS = 60.0
_LOOK_FOR_LOST_SECONDS = 2.0
_CONNECT_SECONDS = 30.0
_ABANDON_SECONDS = 5.0
_LEAVE_SECONDS = 10.0  # that what is under way is waited for when something else has failed
_DOUBTFUL = 8  # failures without an answer between them, at which a server has to prove that it answers anything at all


class Client(Engine):
    """Asks servers, from a thread of its own: what was begun goes on while whoever began it does something else."""

    def __init__(self, config: ServerConfig, cache: RequestCache, budget_tokens: int | None = None, retry_errors: bool = False) -> None:
        super().__init__(config.model, cache, budget_tokens, retry_errors, config.extra)
        self.config = config
        self.limit = AdaptiveLimit(config.first_in_flight, config.max_in_flight)
        self.retries: dict[str, int] = {}  # how often, by reason
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._session: Any = None
        self._endpoints: list[Endpoint] = []
        self._random = random.Random()
        self._own = OwnServer(config, cache.path) if config.start else None
        self._asking: _Asking | None = None

    def close(self) -> None:
        """End the connections, and the server that was started here."""
        if self._loop.is_closed():
            return
        try:
            if self._thread is not None:
                self._in_loop(self._leave())
        finally:
            if self._own is not None:
                self._own.stop()
            if self._thread is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
            self._loop.close()

    def abandon(self) -> None:
        """Stop the server that was started here."""
        if self._own is not None:
            self._own.stop(_ABANDON_SECONDS)

    @property
    def is_busy(self) -> bool:
        """Whether answers are on their way, or waited for."""
        return super().is_busy or (self._asking is not None and self._asking.is_busy)

    def end_soon(self, why: str) -> None:
        """Ask for nothing more."""
        super().end_soon(why)
        if self._asking is not None:
            self._loop.call_soon_threadsafe(self._asking.look)

    def _in_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _take_up(self, requests: dict[str, Request]) -> None:
        if not requests:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop.run_forever, name="rephrasing", daemon=True)
            self._thread.start()
        self._in_loop(self._more(requests))

    async def _more(self, requests: dict[str, Request]) -> None:
        if self._asking is None:
            self._asking = _Asking(self)
        self._asking.take_up(requests)

    def _wait_for(self, keys: set[str], report: Report) -> dict[str, Answer]:
        assert self._asking is not None
        try:
            return self._in_loop(self._asking.until(keys, report))
        except BaseException:
            self._in_loop(self._asking.give_up())
            self._asking = None  # what was begun beside it is begun anew by whoever goes on
            raise

    async def _leave(self) -> None:
        if self._asking is not None:
            await self._asking.give_up()
        if self._session is not None:
            await self._session.close()

    async def open(self) -> None:
        """Make connections possible; where the server is this process's own, start it.

        Raises:
            UserError: the server does not start, the key is not set.
            RunFailed: the server takes too long.
        """
        if self._session is not None:
            return
        aiohttp = need("aiohttp", "rephrasing by a server")
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_seconds, sock_connect=_CONNECT_SECONDS),
        )
        try:
            urls = self.config.urls if self._own is None else [self._own.start()]
            endpoints = [Endpoint(url, self.config, session) for url in urls]
            if self._own is not None:
                await self._own.wait(endpoints[0], lambda: self._ended is not None)
        except BaseException:
            await session.close()
            raise
        self._session, self._endpoints = session, endpoints

    def endpoint(self) -> Endpoint | None:
        """The one with the least to do, of those that are not lost."""
        well = [endpoint for endpoint in self._endpoints if endpoint.lost_since is None]
        return min(well, key=lambda endpoint: endpoint.in_flight) if well else None


class _Asking:
    """Workers as many as the limit says, each with one request at a time; answers are written together, before anyone hears of them."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answers: dict[str, Answer] = {}
        self._waiting: collections.deque[tuple[str, Request]] = collections.deque()
        self._known: set[str] = set()  # waiting, under way, or answered and not fetched yet
        self._missing: set[str] = set()  # of those that somebody waits for
        self._unwritten: list[tuple[str, Answer]] = []
        self._unwritable = False
        self._workers: set[asyncio.Task[None]] = set()
        self._searcher: asyncio.Task[None] | None = None
        self._doubtful: list[tuple[str, Answer]] = []  # failures since the last answer: the requests', or the servers'?
        self._failure: BaseException | None = None  # why no more is asked; what is under way is still waited for, for it is paid
        self._spent = 0
        self._proved = False  # whether anything was ever answered
        self._changed = asyncio.Event()  # something for `_drive` to look at
        self._heard = asyncio.Event()  # something for whoever waits
        self._driver = asyncio.get_running_loop().create_task(self._drive())

    def take_up(self, requests: dict[str, Request]) -> None:
        """More of them, behind those that are there."""
        self._spent = sum(self.client.cache.spent())
        self._proved = self._proved or self._spent > 0
        new = {key: request for key, request in requests.items() if key not in self._known}
        self._known.update(new)
        self._waiting.extend(new.items())
        self.look()

    def look(self) -> None:
        """There is something to be done, or to be left."""
        self._changed.set()

    async def until(self, keys: set[str], report: Report) -> dict[str, Answer]:
        """The answers to some of what was taken up; the rest goes on meanwhile.

        Raises:
            UserError, RunFailed: why they will not all come; what was under way has been waited for.
        """
        self.answers |= self.client.cache.find(keys - self._known)  # whoever asked for the same before has fetched them
        self._missing, told = keys - self.answers.keys(), -1
        while True:
            self._heard.clear()
            if len(self._missing) != told:
                told = len(self._missing)
                report(len(keys) - told)
            if not self._missing:
                self._known -= keys
                return {key: self.answers.pop(key) for key in keys}
            if self._driver.done():
                self._driver.result()
                raise self._failure or RunFailed("given up")
            await self._heard.wait()

    async def _drive(self) -> None:
        """See to it that as many are under way as may be, until something fails and the last that is under way has come."""
        try:
            await self.client.open()
            self._searcher = self._watched(self._look_for_the_lost())
            while self._failure is None or self._workers or (self._unwritten and not self._unwritable):
                self._changed.clear()
                if self.client._ended is not None:
                    self._fail(Stopped(self.client._ended))
                self._hire()
                if self._doubtful and not self._workers and not self._waiting and self._failure is None:
                    await self._settle_doubts()
                else:
                    await self._changed.wait()
        except Exception as error:
            self._fail(error)
        finally:
            self._heard.set()

    def _watched(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        def ended(task: asyncio.Task[None]) -> None:
            self._workers.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error)
            self.look()

        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(ended)
        return task

    @property
    def is_busy(self) -> bool:
        """Whether there is anything under way."""
        return bool(self._workers or self._unwritten)

    async def give_up(self) -> None:
        """Ask no more, wait a while for what is under way, for it is paid, and keep what has come."""
        self._fail(RunFailed("given up"))
        self.look()
        await asyncio.wait({self._driver}, timeout=_LEAVE_SECONDS)
        tasks = [*self._workers, self._driver, *([self._searcher] if self._searcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._workers.clear()
        self._write()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error

    def _hire(self) -> None:
        wanted = 0 if self._failure else min(self.client.limit.limit, len(self._workers) + len(self._waiting))
        while len(self._workers) < wanted:
            self._workers.add(self._watched(self._work()))

    async def _work(self) -> None:
        limit = self.client.limit
        while self._waiting and self._failure is None and len(self._workers) <= limit.limit:
            self.client._refuse_more(self._spent)
            key, request = self._waiting.popleft()
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
        if len(doubtful) >= _DOUBTFUL and not self._proved and not any(answer.transient for _, answer in doubtful):
            raise UserError(f"rephrase: each of the first {len(doubtful)} requests was refused ({doubtful[-1][1].error}), though the server answers something tiny. If its context is too small, "
                            "set a smaller chunk_tokens and max_tokens in the style's file; otherwise change what it does not take (server.extra).")  # fmt: skip
        for failed in doubtful:
            self._take(*failed)

    async def _answer(self, request: Request) -> Answer | None:
        """What comes of a request after all its attempts; None if the run has failed meanwhile."""
        client, payload = self.client, self.client.payload(request)
        attempt, doublings, begin = 0, 0, time.monotonic()
        prompt = completion = 0  # paid for what was none
        while True:
            while (endpoint := client.endpoint()) is None and self._failure is None:
                await asyncio.sleep(_LOOK_FOR_LOST_SECONDS / 4)
            if endpoint is None or (self._failure is not None and attempt):
                return None
            attempt, asked = attempt + 1, time.monotonic()
            try:
                answer = await endpoint.ask(payload)
            except Refused as refused:  # at once, as a rule: it says nothing about how long answers take
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
            client.limit.answered(time.monotonic() - asked, len(self._workers))
            paid = {"prompt_tokens": prompt + answer.prompt_tokens, "completion_tokens": completion + answer.completion_tokens}
            return replace(answer, attempts=attempt, **paid)

    def _take(self, key: str, answer: Answer) -> None:
        self._spent += answer.prompt_tokens + answer.completion_tokens
        self._proved = self._proved or not answer.error
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._write)
        self._unwritten.append((key, answer))

    def _write(self) -> None:
        """What has come since the loop was last here, in one transaction."""
        if not self._unwritten:
            return
        some, self._unwritten = self._unwritten, []
        try:
            self.client._record(some)
        except Exception as error:  # in a callback of the loop, from where nobody would hear of it
            self._fail(error)
            self._unwritable, self._unwritten = True, [*some, *self._unwritten]
        else:
            self.answers.update(some)
            self._missing.difference_update(key for key, _ in some)
            self._heard.set()
        self.look()

    async def _look_for_the_lost(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_FOR_LOST_SECONDS)
            endpoints = self.client._endpoints
            if self.client._own is not None and endpoints[0].lost_since is not None and self.client._own.start_again():
                await self.client._own.wait(endpoints[0], lambda: self._failure is not None)
                endpoints[0].lost_since = None
            await asyncio.gather(*(endpoint.look_again() for endpoint in endpoints if endpoint.lost_since is not None))
            since = [endpoint.lost_since for endpoint in endpoints]
            if all(lost is not None for lost in since):
                away = time.monotonic() - max(lost for lost in since if lost is not None)
                if away > self.client.config.give_up_seconds:
                    told = "; ".join(f"{endpoint.url}: {endpoint.last_words}" for endpoint in endpoints)
                    raise RunFailed(f"server.urls: no server has answered for {away:.0f} s ({told}). What was answered is kept; start the server and run "
                                    "the same again.")  # fmt: skip
