"""How long a step waits for its batch: from a disk whose pages are cold, and from stores that answer slowly.

A loop takes a batch of 32 x 2,048 tokens every 50 ms (1.3M tokens a second), two of them built ahead. The stores are a real HTTP server on this machine that
lets every request wait and sends no faster than it is told; each is read with an empty cache, and once more with what was kept.

    python benchmarks/loader_waits.py --quick
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from loader import made_up_corpus
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.feed import Feed
from regrowth.data_pipeline.loader import Loader
from regrowth.data_pipeline.mixing.config import StaticMixing
from regrowth.data_pipeline.remote import open_remote

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
        data, wanted = path.read_bytes(), self.headers.get("Range")
        begin, end = 0, len(data)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), int(last) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        for at in range(begin, end, _PIECE):
            self.wfile.write(data[at : min(at + _PIECE, end)])
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


def waits(corpus: Corpus, steps: int) -> tuple[float, np.ndarray]:
    """Seconds until the first batch is there, and those that each later step waited."""
    config = LoaderConfig(sequence_length=2048, global_batch=32, unit_sequences=32)
    loader = Loader(corpus, config, StaticMixing())
    feed = Feed(loader, 0, 1, lambda batch: batch, steps)
    seconds = []
    for step in range(steps):
        feed.take(step)
        seconds.append(feed.waited)
        loader.observe(step, {0: 1.0})
        time.sleep(_STEP_SECONDS)
    feed.close()
    return seconds[0], np.array(seconds[1:])


def forget_pages(folder: Path) -> None:
    """Ask the system to drop what it holds of the shards, so that they come from the disk."""
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
        near = made_up_corpus(folder / "corpus", (steps + 32) << 16, shards=4)

        def add(what: str, corpus: Corpus) -> None:
            first, later = waits(corpus, steps)
            shown = (f"{1e3 * value:,.1f} ms" for value in (first, np.median(later), np.quantile(later, 0.99), later.max()))
            table.add_row(what, *shown)

        add("memory (pages warm)", near)
        forget_pages(near.folder)
        add("a cold disk", Corpus.open(near.folder))
        for what, latency, rate in (("20 ms, 100 MB/s", 0.02, 1e8), ("200 ms, 8 MB/s", 0.2, 8e6)):
            with store(near.folder, latency, rate) as address:
                for state in ("empty cache", "full cache"):
                    add(f"a store of {what}, {state}", open_remote(address, folder / "cache" / what.replace(" ", ""), 1e12))
    table.caption = "the limit is a step, 50 ms: what is waited for less often than once in a hundred steps costs nobody anything"
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
