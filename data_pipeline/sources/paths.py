"""Paths, local or remote: finding files, their sizes and stamps, opening them, and unpacking them within limits."""

import bz2
import glob
import gzip
import io
import lzma
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from regrowth.errors import UserError, need

PACKED = ("", ".gz", ".zst", ".xz", ".bz2")
# Below this size no ratio of packed to unpacked bytes is suspicious.
_BOMB_FROM_BYTES = 256 << 20


@dataclass(frozen=True)
class Found:
    """A file to read: its path or address, its size in bytes (0 if unknown), and a stamp that changes when it does."""

    path: str
    size: int
    stamp: str


class DamagedFileError(OSError):
    """A packed file ends in the middle, or unpacks to far more than a text could."""


def is_remote(path: str) -> bool:
    """Whether fsspec has to open it."""
    return "://" in path


def find_files(path: str, suffixes: tuple[str, ...], key: str) -> list[Found]:
    """The files at `path`: itself, below it if a folder, matching it if a glob; sorted.

    Raises:
        UserError: there is nothing at `path`, nothing with these suffixes, or a folder that may not be read.
    """
    if is_remote(path):
        return _find_remote(path, suffixes, key)
    local = Path(path)
    if local.is_file():
        return [_local(local)]
    if local.is_dir():
        found = sorted(p for p in _walk(local, key) if p.name.endswith(suffixes))
        if not found:
            raise UserError(f"{key} = {path}: no file in this folder ends in {', '.join(suffixes)}.")
        return [_local(p) for p in found]
    found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())  # noqa: PTH207
    if not found:
        raise UserError(f"{key} = {path}: there is no such file or folder (and as a pattern it matches none).")
    return [_local(p) for p in found]


def _walk(folder: Path, key: str) -> list[Path]:
    """All files below a folder. A folder that cannot be listed is refused: what is in it would be left out unseen."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{key} = {folder}: {error.filename} cannot be listed ({error.strerror}). Make it readable, or name the readable "
                        "folders as sources of their own.") from error  # fmt: skip

    found, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back into the tree
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in names:
            path = Path(root) / name
            if path.is_symlink() and not path.exists():
                raise UserError(f"{key} = {folder}: {path} is a link to nothing. Mend it or remove it.")
            if path.is_file():
                found.append(path)
    return found


def _local(path: Path) -> Found:
    stat = path.stat()
    return Found(str(path), stat.st_size, str(stat.st_mtime_ns))


def _find_remote(path: str, suffixes: tuple[str, ...], key: str) -> list[Found]:
    fs, inner = _filesystem(path, key)
    try:
        if any(c in inner for c in "*?["):
            infos = fs.glob(inner, detail=True)
        elif fs.isfile(inner):
            infos = {inner: fs.info(inner)}
        else:
            infos = {name: info for name, info in fs.find(inner, detail=True).items() if name.endswith(suffixes)}
    except Exception as error:  # each protocol has errors of its own
        raise UserError(f"{key} = {path}: could not be listed: {type(error).__name__}: {error}") from error
    files = {name: info for name, info in infos.items() if info.get("type", "file") == "file"}
    if not files:
        raise UserError(f"{key} = {path}: there is nothing here that ends in {', '.join(suffixes)}.")
    return [
        Found(
            fs.unstrip_protocol(name),
            int(info.get("size") or 0),
            str(info.get("ETag") or info.get("LastModified") or info.get("mtime") or ""),
        )
        for name, info in sorted(files.items())
    ]


def _filesystem(path: str, key: str) -> tuple[Any, str]:
    fsspec = need("fsspec", f"the address {path}")
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{key} = {path}: {error}. Install the package that opens {path.split('://')[0]}:// addresses (s3fs, gcsfs, ...)."
        ) from error


def open_raw(path: str) -> BinaryIO:
    """Open for reading bytes, as they are stored. What goes wrong at a remote address is raised as an OSError."""
    if not is_remote(path):
        return Path(path).open("rb")
    fs, inner = _filesystem(path, "path")
    try:
        return cast(BinaryIO, io.BufferedReader(_Remote(fs.open(inner, "rb")), 1 << 20))
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Remote(io.RawIOBase):
    """A file of fsspec with the whole interface of files, and with OSError for whatever its protocol raises."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.inner.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self.inner.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.inner.read(len(buffer))
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.inner.close()
        super().close()


def open_packed(path: str, max_ratio: float = 200.0) -> BinaryIO:
    """Open for reading bytes, unpacking .gz, .zst, .xz and .bz2 as a stream.

    Reading raises DamagedFileError where a file ends in the middle, and where it unpacks to more than `max_ratio` times its size (looked at
    from 256 MB on).
    """
    raw = open_raw(path)
    suffix = Path(path).suffix
    if suffix == ".gz":
        inner: Any = gzip.GzipFile(fileobj=raw)
    elif suffix == ".xz":
        inner = lzma.LZMAFile(raw)  # noqa: SIM115
    elif suffix == ".bz2":
        inner = bz2.BZ2File(raw)
    elif suffix in (".zst", ".zstd"):
        inner = _Zstd(raw)
    else:
        return raw
    return cast(BinaryIO, io.BufferedReader(_Guarded(inner, raw, max_ratio), 1 << 20))


class _Guarded(io.RawIOBase):
    """An unpacking stream that stops at a bomb and turns each library's own complaints into one."""

    def __init__(self, inner: Any, raw: BinaryIO, max_ratio: float) -> None:
        self.inner, self.raw, self.max_ratio, self.unpacked = inner, raw, max_ratio, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.inner.read1(len(buffer))  # not read: that loses what it has gathered when the end turns out to be missing
        except (EOFError, lzma.LZMAError, OSError) as error:
            raise DamagedFileError(f"ends in the middle or is damaged ({error})") from error
        except Exception as error:  # zlib.error, ZstdError: neither is an OSError
            raise DamagedFileError(f"cannot be unpacked ({type(error).__name__}: {error})") from error
        buffer[: len(data)] = data
        self.unpacked += len(data)
        if self.unpacked > _BOMB_FROM_BYTES and self.unpacked > self.max_ratio * max(self.raw.tell(), 1):
            raise DamagedFileError(f"unpacks to over {self.unpacked / 1e6:.0f} MB, more than {self.max_ratio:g} times its size: left there")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.inner.close()
            self.raw.close()
        super().close()


class _Zstd:
    """Frames of zstandard one after the other, noticing when the last one is not whole (the library's own reader does not).

    Fed a kilobyte at a time: that much packed text can unpack to at most about 32 MB, so that a bomb is seen before it fills the memory.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self.raw, self.make = raw, zstandard.ZstdDecompressor(max_window_size=1 << 27)
        self.frame: Any = None
        self.pending, self.held, self.at = b"", b"", 0

    def read1(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end."""
        while self.at == len(self.held):
            data = self.pending or self.raw.read(1 << 10)
            self.pending = b""
            if not data:
                if self.frame is not None:
                    raise EOFError("the last frame is not whole")
                return b""
            if self.frame is None:
                self.frame = self.make.decompressobj()
            self.held, self.at = self.frame.decompress(data), 0
            if self.frame.eof:
                self.pending, self.frame = self.frame.unused_data, None
        begin, self.at = self.at, min(self.at + size, len(self.held))
        return self.held[begin : self.at]

    def close(self) -> None:
        """Nothing to close: the file is the caller's."""
