"""A corpus at an address (s3://, gs://, ...): its blocks are fetched when they are first read, and kept in a cache on this machine.

One request fetches one block of a shard; its hash is checked before it is kept. Processes of a machine share the cache, and a block is fetched by one of
them. While a block is read, the next two of its domain are fetched in threads.
"""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.shards import Block, DamagedShard, Shard, ShardIndex, read_index
from regrowth.errors import RunFailed, UserError, need
from regrowth.files import atomic_path, exclusive, fingerprint, user_cache

_ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.5
_FETCHERS = ThreadPoolExecutor(4, "blocks")
_LOOK_EVERY = 16  # blocks fetched between two looks at the size of the cache


class Cache:
    """Files of one corpus on this machine. Its folder is named by the address and what stood there: a corpus made anew is another.

    Args:
        limit: bytes of blocks and shards that are kept, of all corpora; those that were read longest ago go first.
    """

    def __init__(self, address: str, root: Path, limit: float) -> None:
        fsspec = need("fsspec", f"the corpus at {address}")
        try:
            self.fs, self.base = fsspec.core.url_to_fs(address.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{address}: {error}. Install the package that opens {address.split('://')[0]}:// addresses (s3fs, gcsfs, ...)."
            ) from error
        self.address, self.root, self.limit = address.rstrip("/"), root, limit
        self.fetched = 0
        manifest = self.fetch("corpus.json")
        self.folder = root / fingerprint([self.address, hashlib.sha256(manifest).hexdigest()])
        self._keep("corpus.json", manifest)

    def fetch(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a file of the corpus.

        Raises:
            UserError: it is not there.
            RunFailed: it could not be fetched in several attempts.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return self.fs.cat_file(f"{self.base}/{name}", start=begin, end=end)
            except FileNotFoundError as error:
                raise UserError(f"{self.address}/{name}: there is nothing there.") from error
            except Exception as error:  # each protocol has errors of its own
                if attempt + 1 == _ATTEMPTS:
                    told = f"{self.address}/{name}: could not be fetched in {_ATTEMPTS} attempts ({type(error).__name__}: {error}). Resume when it can."
                    raise RunFailed(told) from error
                time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
        raise AssertionError

    def whole(self, name: str) -> Path:
        """A whole file of the corpus, fetched if it is not here."""
        path = self.folder / name
        try:
            os.utime(path)
        except FileNotFoundError:
            self._keep(name, self.fetch(name))
        return path

    def _keep(self, name: str, data: bytes) -> None:
        with atomic_path(self.folder / name) as partial:
            partial.write_bytes(data)

    def make_room(self) -> None:
        """Remove the blocks and shards read longest ago while there are too many."""
        self.fetched += 1
        if self.fetched % _LOOK_EVERY != 1:
            return
        found = []
        for path in (*self.root.glob("*/blocks/*/*.bin"), *self.root.glob("*/*/*/*.arrow")):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process was faster
                continue
        size = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, path in sorted(found):
            if size <= self.limit:
                break
            path.unlink(missing_ok=True)
            size -= bytes_


def open_remote(address: str, root: Path, limit: float) -> Corpus:
    """The finished corpus at an address; its manifest and tokenizer are fetched, its shards when they are read.

    Raises:
        UserError: there is none.
    """
    cache = Cache(address, root, limit)
    cache.whole("tokenizer/tokenizer.json")
    corpus = Corpus.open(cache.folder)
    splits = {
        split: {domain: [{**row, "cache": cache} for row in rows] for domain, rows in by_domain.items()}
        for split, by_domain in corpus.manifest["splits"].items()
    }
    return Corpus(cache.folder, {**corpus.manifest, "splits": splits}, cache.address)


class RemoteShard(Shard):
    """A shard at an address: its index is fetched when it is opened, its blocks when they are read."""

    def __init__(self, cache: Cache, row: dict[str, Any]) -> None:
        self.cache, self.name = cache, str(row["path"])
        self.shown = f"{cache.address}/{self.name}"
        self.path = cache.folder / self.name  # where it is when all of it was fetched
        index = str(Path(self.name).with_suffix(".json"))
        self.index: ShardIndex = read_index(cache.whole(index))
        if self.index.sha256 != row["sha256"]:  # the corpus was being replaced while it was fetched
            (cache.folder / index).unlink()
            self.index = read_index(cache.whole(index))
        self.blocks = cache.folder / "blocks" / self.index.sha256[:32]
        self._checked: set[int] = set()

    def whole_block(self, number: int) -> Block:
        """As of a local shard; fetched if it is not here.

        Raises:
            DamagedShard: what was fetched does not match its hash.
            RunFailed: it could not be fetched.
        """
        path, (begin, end) = self.blocks / f"{number}.bin", self._span(number)
        try:
            data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            os.utime(path)
        except (FileNotFoundError, ValueError):
            data = self._fetch(number, begin, end)
        try:
            if len(data) == end - begin:
                return self._block(number, data, begin)
        except DamagedShard:
            pass
        path.unlink(missing_ok=True)  # not what was kept: fetched anew, and what comes then is final
        return self._block(number, self._fetch(number, begin, end), begin)

    def ahead(self, number: int) -> None:
        """Begin to fetch a block that will be read soon."""
        if not (self.blocks / f"{number}.bin").exists():
            _FETCHERS.submit(self._fetch, number, *self._span(number))

    def table(self, number: int) -> pa.RecordBatch:
        """Block `number` with all its columns; fetches the whole shard."""
        return Shard(self._whole_file()).table(number)

    def verify(self) -> None:
        """Fetch the whole shard and check it as a local one."""
        Shard(self._whole_file()).verify()

    def _whole_file(self) -> Path:
        self.cache.make_room()
        return self.cache.whole(self.name)

    def _fetch(self, number: int, begin: int, end: int) -> np.ndarray:
        self.blocks.mkdir(parents=True, exist_ok=True)
        path = self.blocks / f"{number}.bin"
        with exclusive(self.blocks / f".{number}.lock"):
            if path.exists() and path.stat().st_size == end - begin:
                return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            fetched = self.cache.fetch(self.name, begin, end)
            data = np.frombuffer(fetched, dtype=np.uint8)
            self._block(number, data, begin)  # checked before it is kept
            self.cache.make_room()
            with atomic_path(path) as partial:
                partial.write_bytes(fetched)
        return data


def cache_root(setting: Path | None) -> Path:
    """Where corpora are cached: as set, or the user's own cache folder."""
    if setting is not None:
        return setting
    return user_cache() / "corpora"
