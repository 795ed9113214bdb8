"""Web pages: WARC, WET and ARC archives, and folders of HTML files, as plain text.

fastwarc reads the records, resiliparse (or trafilatura) finds the text of a page. Nothing of a record is dropped in silence: what is no page, is
too large, was cut off or has no text comes with its reason and offset (in the stored file, so that a record can be fetched again by it).
"""

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import HtmlSource, WarcSource, WebSettings
from regrowth.data_pipeline.sources.base import Item, grouped, item_of
from regrowth.data_pipeline.sources.paths import find_files, open_packed, open_raw
from regrowth.errors import need

_HTML_TYPES = ("text/html", "application/xhtml+xml")
_MAX_HEADER_BYTES = 64 << 10


class Extractor:
    """From a page's bytes to its text."""

    def __init__(self, config: WebSettings) -> None:
        self.config = config
        purpose = "reading web pages"
        self._encoding = need("resiliparse.parse.encoding", purpose)
        if config.extractor == "trafilatura":
            self._trafilatura = need("trafilatura", purpose)
        else:
            self._text = need("resiliparse.extract.html2text", purpose)

    def decode(self, page: bytes, charset: str | None = None) -> str:
        """The page as a string: by the charset that its server named if that decodes it, else by detection."""
        known = self._encoding.map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
        return self._encoding.bytes_to_str(page, known or self._encoding.detect_encoding(page, from_html_meta=True))

    def text(self, html: str) -> str:
        """The text of a page; empty where there is none."""
        if self.config.extractor == "trafilatura":
            return self._trafilatura.extract(html, include_comments=False, favor_precision=self.config.main_content) or ""
        return self._text.extract_plain_text(html, main_content=self.config.main_content, alt_texts=False)

    def document(self, page: bytes, source: str, meta: dict[str, Any], charset: str | None = None, is_html: bool = True) -> Raw:
        """A page as a document, or as a dropped one with its reason."""
        if len(page) > self.config.max_page_megabytes * 1e6:
            return Raw("", self.config.domain, source, meta, dropped="page_too_large")
        try:
            decoded = self.decode(page, charset)
            text = self.text(decoded) if is_html else decoded
        except Exception as error:  # parsers of foreign bytes: whatever they raise costs this page alone
            return Raw("", self.config.domain, source, {**meta, "error": f"{type(error).__name__}: {error}"[:200]}, dropped="not_parsed")
        return Raw(text, self.config.domain, source, meta, dropped="" if text.strip() else "no_text")


class WarcFiles:
    """Records of web archives."""

    def __init__(self, config: WarcSource) -> None:
        self.config = config

    def items(self, target_bytes: int) -> list[Item]:
        """One item an archive."""
        suffixes = tuple(f".{kind}{packed}" for kind in ("warc", "wet", "arc") for packed in ("", ".gz"))
        return [item_of(file) for file in find_files(self.config.path, suffixes, "data.sources.path")]

    def read(self, item: Item) -> Iterator[Raw]:
        """The pages of an archive."""
        path = item.paths[0]
        extractor = Extractor(self.config)
        records = _arc_records if path.removesuffix(".gz").endswith(".arc") else _warc_records
        offset = 0
        try:
            with open_packed(path) if records is _arc_records else open_raw(path) as stream:
                for offset, record in records(stream, int(self.config.max_page_megabytes * 1e6)):
                    if record is None:
                        continue
                    url, date, kind, charset, body, problem = record
                    meta = {"url": url, "date": date, "content_type": kind}
                    if problem or not body:
                        yield Raw("", self.config.domain, f"{path}@{offset}", meta, dropped=problem or "empty_page")
                    else:
                        yield extractor.document(body, f"{path}@{offset}", meta, charset, kind in _HTML_TYPES)
        except (OSError, EOFError, ValueError) as error:
            yield Raw("", self.config.domain, f"{path}@after-{offset}", {"error": str(error)}, dropped="damaged_file")


# url, date, content type, charset, body, and what is wrong with it
_Record = tuple[str, str, str, str | None, bytes, str]


def _warc_records(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, _Record | None]]:
    warc = need("fastwarc.warc", "reading web archives")
    wanted = warc.WarcRecordType.response | warc.WarcRecordType.conversion | warc.WarcRecordType.resource
    offset, truncated = 0, False
    for record in warc.ArchiveIterator(stream, record_types=warc.WarcRecordType.any_type, parse_http=False):
        offset = record.stream_pos
        url = (record.headers.get("WARC-Target-URI") or "").strip("<>")
        if not record.record_type & wanted or url.startswith("dns:"):
            yield offset, None  # requests, metadata and the like are no pages
            continue
        body = record.reader.read(max_bytes + _MAX_HEADER_BYTES)
        truncated = len(body) < record.content_length and len(body) < max_bytes + _MAX_HEADER_BYTES
        named, charset = record.headers.get("Content-Type") or "", "utf-8"
        problem = ""
        if record.record_type == warc.WarcRecordType.response:
            status, headers, body, problem = _parse_http(body, max_bytes)
            named = headers.get("content-type", "")
            charset = _charset(named)
            problem = "http_status" if status != 200 else problem
        kind = named.partition(";")[0].strip().lower()
        if truncated:
            problem = "truncated_record"
        elif not problem and not (kind in _HTML_TYPES or kind == "text/plain"):
            problem = "not_a_page"
        date = record.record_date.isoformat() if record.record_date else ""
        yield offset, (url, date, kind, charset, body, problem)
    if not truncated and not _ends_whole(stream, offset):
        raise EOFError("the archive ends in the middle of a record")


def _charset(content_type: str) -> str | None:
    return content_type.partition(";")[2].lower().partition("charset=")[2].strip(" \"'\r") or None


def _ends_whole(stream: BinaryIO, last: int) -> bool:
    """Whether an archive ends where a record ends; the reader stops in silence when it is cut in a record's header."""
    size = stream.seek(0, 2)
    stream.seek(last)
    begin = stream.read(2)
    if begin != b"\x1f\x8b":
        stream.seek(max(size - 4, 0))
        return size == 0 or stream.read(4).endswith(b"\r\n\r\n") or size < 4
    stream.seek(last)
    member = zlib.decompressobj(31)
    while data := stream.read(1 << 16):
        while data:
            member.decompress(data)
            data = member.unused_data
            if member.eof and data:
                member = zlib.decompressobj(31)
            elif not member.eof:
                break
    return member.eof


def _arc_records(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, _Record | None]]:
    """ARC 1.0 and 2.0: a line "URL IP date type ... length", then that many bytes; an HTTP response inside."""
    offset = 0
    while line := stream.readline(_MAX_HEADER_BYTES):
        begin = offset
        offset += len(line)
        if not line.strip():
            continue
        fields = line.decode("utf-8", "replace").split(" ")
        if len(fields) < 5 or not fields[-1].strip().isdecimal():
            raise ValueError(f"not an ARC record at byte {begin}: {line[:80]!r}")
        length = int(fields[-1])
        body = stream.read(min(length, max_bytes + _MAX_HEADER_BYTES))
        offset += len(body)
        left = length - len(body)
        while left > 0 and (skipped := stream.read(min(left, 1 << 20))):
            left -= len(skipped)
            offset += len(skipped)
        if fields[0].startswith("filedesc:") or not fields[0].startswith("http"):
            yield begin, None
            continue
        status, headers, page, problem = _parse_http(body, max_bytes)
        named = headers.get("content-type", fields[3])
        charset, kind = _charset(named), named.partition(";")[0].strip().lower()
        problem = "truncated_record" if left > 0 else "http_status" if status != 200 else problem
        if not problem and kind not in _HTML_TYPES and kind != "text/plain":
            problem = "not_a_page"
        yield begin, (fields[0], fields[2], kind, charset, page, problem)


def _parse_http(data: bytes, max_bytes: int) -> tuple[int, dict[str, str], bytes, str]:
    """Status, headers by lower-case name, the body with its codings undone, and what is wrong with those."""
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        head, _, body = data.partition(b"\n\n")
    first, *lines = head.decode("latin-1").splitlines() or [""]
    parts = first.split()
    status = int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _unchunked(body)
    coding = headers.get("content-encoding", "").lower()
    # Archives often keep the header of a coding that they have undone already: the bytes decide.
    if coding in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
        return status, headers, *_inflated(body, 31, max_bytes)
    if coding == "deflate" and body and body[0] & 0x0F == 8:
        return status, headers, *_inflated(body, 15, max_bytes)
    if coding in ("br", "zstd") and body.lstrip()[:1] != b"<":
        return status, headers, b"", f"coded_{coding}"
    return status, headers, body, ""


def _inflated(body: bytes, window: int, max_bytes: int) -> tuple[bytes, str]:
    try:
        return zlib.decompressobj(window).decompress(body, max_bytes + 1), ""
    except zlib.error:
        return b"", "not_decoded"


def _unchunked(body: bytes) -> bytes:
    """The chunks of a chunked body joined; a body that is not chunked after all comes back as it is."""
    pieces, at = [], 0
    while at < len(body):
        line = body.find(b"\r\n", at, at + 64)
        try:
            size = int(body[at:line].partition(b";")[0], 16) if line > 0 else -1
        except ValueError:
            size = -1
        if size < 0:
            return b"".join(pieces) if pieces else body
        if size == 0:
            break
        pieces.append(body[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return b"".join(pieces)


class HtmlFiles:
    """HTML files, one page a file; the path below the source's is kept as the page's address."""

    def __init__(self, config: HtmlSource) -> None:
        self.config = config

    def items(self, target_bytes: int) -> list[Item]:
        """Files in path order, small ones grouped."""
        return grouped(find_files(self.config.path, (".html", ".htm", ".xhtml"), "data.sources.path"), target_bytes)

    def read(self, item: Item) -> Iterator[Raw]:
        """The pages of the item's files."""
        extractor = Extractor(self.config)
        for path in item.paths:
            try:
                with open_raw(path) as file:
                    page = file.read(int(self.config.max_page_megabytes * 1e6) + 1)
            except OSError as error:
                yield Raw("", self.config.domain, path, {"error": str(error)}, dropped="unreadable_file")
                continue
            yield extractor.document(page, path, {}) if page else Raw("", self.config.domain, path, dropped="empty_page")
