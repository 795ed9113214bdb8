"""How long a step waits for its batch: from a disk whose pages are cold, and from stores that answer slowly.

A loop takes a batch of 32 x 2,048 tokens every 50 ms (1.3M tokens a second), two of them built ahead. The stores are a real HTTP server on this machine that
lets every request wait and sends no faster than it is told; each is read with an empty cache, and once more with what was kept.

    python benchmarks/loader_waits.py --quick
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from loader import made_up_corpus
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpora import open_corpora
from regrowth.data_pipeline.feed import Feed
from regrowth.data_pipeline.loader import Loader
from regrowth.data_pipeline.mixing.config import StaticMixing

_STEP_SECONDS = 0.05
_PIECE = 1 << 16


class SlowStore(SimpleHTTPRequestHandler):
    """Files below a folder, whole or a range of bytes, after a wait and at a rate."""

    def __init__(self, *arguments: object, latency: float, rate: float, **more: object) -> None:
        self.latency, self.rate = latency, rate
        super().__init__(*arguments, **more)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer slowly."""
        time.sleep(self.latency)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size, wanted = path.stat().st_size, self.headers.get("Range")
        begin, end = 0, size
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), int(last) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(begin)
            for at in range(begin, end, _PIECE):
                self.wfile.write(file.read(min(_PIECE, end - at)))
                time.sleep(_PIECE / self.rate)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def store(folder: Path, latency: float, rate: float) -> Iterator[str]:
    """The address of a slow store of a folder.

    Args:
        latency: seconds before each answer.
        rate: bytes a second of one connection.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowStore, latency=latency, rate=rate, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def waits(place: str, cache: Path, steps: int) -> tuple[float, np.ndarray]:
    """Seconds until the first batch is there, and those that each later step waited; in a process of its own, which has nothing mapped yet."""
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe()
    process = context.Process(target=_wait, args=(place, cache, steps, there))
    process.start()
    there.close()
    seconds = pipe.recv()
    process.join()
    return seconds[0], np.array(seconds[1:])


def _wait(place: str, cache: Path, steps: int, pipe: Any) -> None:
    config = LoaderConfig(sequence_length=2048, global_batch=32, unit_sequences=32, cache=cache)
    loader = Loader(open_corpora(place, config), config, StaticMixing())
    feed = Feed(loader, 0, 1, lambda batch: batch, steps)
    seconds = []
    for step in range(steps):
        feed.take(step)
        seconds.append(feed.waited)
        loader.observe(step, {0: 1.0})
        time.sleep(_STEP_SECONDS)
    feed.close()
    pipe.send(seconds)


def forget_pages(folder: Path) -> None:
    """Ask the system to drop what it holds of the shards, so that they come from the disk; nothing may have them mapped."""
    for path in folder.rglob("*.arrow"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    steps = 100 if parser.parse_args().quick else 1000
    table = Table(
        "read from", "first batch", "later steps: median wait", "99%", "longest", title=f"{steps} steps of 50 ms, 65,536 tokens each"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        near = str(made_up_corpus(folder / "corpus", (steps + 32) << 16, shards=4).folder)

        def add(what: str, place: str) -> None:
            first, later = waits(place, folder / "cache" / place.rsplit(":", 1)[-1].strip("/").replace("/", "_"), steps)
            shown = (f"{1e3 * value:,.1f} ms" for value in (first, np.median(later), np.quantile(later, 0.99), later.max()))
            table.add_row(what, *shown)

        add("memory (pages warm)", near)
        if hasattr(os, "posix_fadvise"):
            forget_pages(Path(near))
            add("a cold disk", near)
        for what, latency, rate in (("20 ms, 100 MB/s", 0.02, 1e8), ("200 ms, 8 MB/s", 0.2, 8e6)):
            with store(Path(near), latency, rate) as address:
                for state in ("empty cache", "full cache"):
                    add(f"a store of {what}, {state}", address)
    table.caption = "the limit is a step, 50 ms: what is waited for less often than once in a hundred steps costs nobody anything"
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
