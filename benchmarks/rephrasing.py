"""What the client of language models costs, and how much of a server it uses.

Overhead: requests a second against a server in another process that answers at once with a canned completion, cache included; beside the same requests by plain aiohttp, 64 at a time,
without a cache. Utilisation: against a server with so many places, each of which takes so long an answer, the ideal time over the time taken, the climb from 8 requests at once included;
through the transform, whose batches have to overlap for it.

    python benchmarks/rephrasing.py --quick
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.document import Raw, to_batches
from regrowth.data_pipeline.phases.base import new_funnel
from regrowth.data_pipeline.phases.curate import through
from regrowth.data_pipeline.rephrase.cache import RequestCache
from regrowth.data_pipeline.rephrase.client import Client
from regrowth.data_pipeline.rephrase.config import ServerConfig
from regrowth.data_pipeline.rephrase.engine import Request
from regrowth.data_pipeline.rephrase.transform import Rephraser
from regrowth.data_pipeline.transform_config import Rephrase

_ANSWER = json.dumps(
    {
        "model": "small",
        "choices": [{"message": {"content": "An answer of a usual length, in other words. " * 20}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 220},
    }
).encode()
_RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_ANSWER) + _ANSWER
_TEXT = "The town has a bridge of wood, which burned and was built anew more than once, and is paid for by those who cross it. " * 8


class _Canned(asyncio.Protocol):
    """As little of HTTP as a client can be answered with."""

    places: asyncio.Semaphore | None = None
    seconds = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport, self.held = transport, b""

    def data_received(self, data: bytes) -> None:
        self.held += data
        while (end := self.held.find(b"\r\n\r\n")) >= 0:
            head = self.held[:end].lower()
            begin = head.index(b"content-length:") + 15
            whole = end + 4 + int(head[begin : (head.find(b"\r", begin) + 1 or len(head) + 1) - 1])
            if len(self.held) < whole:
                return
            self.held = self.held[whole:]
            if self.places is None:
                self.transport.write(_RESPONSE)
            else:
                task = asyncio.get_running_loop().create_task(self._later())
                self.task = task

    async def _later(self) -> None:
        assert self.places is not None
        async with self.places:
            await asyncio.sleep(self.seconds)
        self.transport.write(_RESPONSE)


def _serve(pipe: Connection, places: int, seconds: float) -> None:
    async def forever() -> None:
        _Canned.places, _Canned.seconds = (asyncio.Semaphore(places) if places else None), seconds
        server = await asyncio.get_running_loop().create_server(_Canned, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


class Server:
    """In a process of its own."""

    def __init__(self, places: int = 0, seconds: float = 0.0) -> None:
        ours, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, places, seconds), daemon=True)
        self.process.start()
        self.url = f"http://127.0.0.1:{ours.recv()}/v1"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()


def overhead(count: int, folder: Path, name: str) -> float:
    """Requests a second by the client."""
    requests = [
        Request({"messages": [{"role": "user", "content": f"{i} {_TEXT}"}], "max_tokens": 300}, (f"id-{i}", "easy@1")) for i in range(count)
    ]
    with Server() as server:
        client = Client(ServerConfig(urls=[server.url], model="small"), RequestCache(folder / f"{name}.sqlite"))
        begin = time.perf_counter()
        answers = client.answers(requests)
        seconds = time.perf_counter() - begin
        client.close()
    assert len(answers) == count and all(answer.text for answer in answers)
    return count / seconds


def bare(count: int, at_once: int = 64) -> float:
    """Requests a second by aiohttp alone, each answer parsed."""
    import aiohttp

    async def ask(url: str) -> None:
        left = iter(range(count))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def worker() -> None:
                for i in left:
                    body = json.dumps(
                        {"model": "small", "messages": [{"role": "user", "content": f"{i} {_TEXT}"}], "max_tokens": 300}
                    ).encode()
                    async with session.post(f"{url}/chat/completions", data=body, headers={"content-type": "application/json"}) as response:
                        json.loads(await response.read())

            await asyncio.gather(*(worker() for _ in range(at_once)))

    with Server() as server:
        begin = time.perf_counter()
        asyncio.run(ask(server.url))
        return count / (time.perf_counter() - begin)


def utilisation(places: int, seconds: float, count: int, folder: Path) -> float:
    """Of a server with so many places, the share that a run through the transform uses: documents in batches of a twentieth of them."""
    with Server(places, seconds) as server:
        config = Rephrase.model_validate(
            {"kind": "rephrase", "server": {"urls": [server.url], "model": "small"}, "cache": str(folder / "used.sqlite")}
        )
        documents = [Raw(f"{i} {_TEXT}", "web", f"made@{i}") for i in range(count)]
        batches = [batch for batch, _ in to_batches(documents, bytes_per_batch=count * len(_TEXT) // 20)]
        rephraser = Rephraser(config)
        transforms: list[Any] = [rephraser]
        begin = time.perf_counter()
        made = sum(map(len, through(transforms, iter(batches), new_funnel(), _nothing)))
        taken = time.perf_counter() - begin
        rephraser.close()
    assert made >= count and rephraser.engine.recorded == count
    return count * seconds / places / taken


def _nothing(dropped: pa.RecordBatch) -> None:
    """What is dropped is of no interest here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    scale = 1 if parser.parse_args().quick else 4
    table = Table("what", "figure", "bar")
    with tempfile.TemporaryDirectory() as folder:
        rates = [(overhead(5000 * scale, Path(folder), str(turn)), bare(5000 * scale)) for turn in range(3)]
        ours, theirs = (sorted(column)[1] for column in zip(*rates, strict=True))
        table.add_row("requests a second, server that answers at once (median of 3)", f"{ours:,.0f}", "at least 2,000")
        table.add_row("the same by plain aiohttp, no cache", f"{theirs:,.0f}", "")
        for places, seconds in ((32, 0.2), (128, 0.25)):
            used = utilisation(places, seconds, round(15 * scale * places / seconds), Path(folder))
            table.add_row(f"utilisation of {places} places of {seconds:g} s", f"{used:.1%}", "at least 95%, of a minute")
            (Path(folder) / "used.sqlite").unlink()
    Console().print(table)


if __name__ == "__main__":
    main()
