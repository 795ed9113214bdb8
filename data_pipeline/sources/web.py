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
            self._html, self._text = need("resiliparse.parse.html", purpose), need("resiliparse.extract.html2text", purpose)

    def decode(self, page: bytes, charset: str | None = None) -> str:
        """The page as a string: by the charset that its server named if that decodes it, else by detection."""
        known = self._encoding.map_encoding_to_html5(charset) if charset else None
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
    for record in warc.ArchiveIterator(stream, record_types=wanted, parse_http=True):
        url = record.headers.get("WARC-Target-URI") or ""
        http = record.record_type == warc.WarcRecordType.response
        if http and not url.startswith(("http:", "https:", "<http")):
            yield record.stream_pos, None  # dns: and the like are no pages
            continue
        promised = record.content_length
        body = record.reader.read(max_bytes + 1)
        named = record.http_content_type if http else record.headers.get("Content-Type")
        kind = (named or "").split(";")[0].strip().lower()
        problem = ""
        if http and record.http_headers is not None and record.http_headers.status_code != 200:
            problem = "http_status"
        elif len(body) < promised and len(body) <= max_bytes:
            problem = "truncated_record"
        elif not (kind in _HTML_TYPES or kind == "text/plain"):
            problem = "not_a_page"
        date = record.record_date.isoformat() if record.record_date else ""
        yield record.stream_pos, (url.strip("<>"), date, kind, record.http_charset if http else "utf-8", body, problem)


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
        status, headers, page = _parse_http(body)
        kind, _, rest = headers.get("content-type", fields[3]).partition(";")
        charset = rest.partition("charset=")[2].strip(" \"'\r") or None
        problem = "truncated_record" if left > 0 else "http_status" if status != 200 else ""
        kind = kind.strip().lower()
        if not problem and kind not in _HTML_TYPES and kind != "text/plain":
            problem = "not_a_page"
        yield begin, (fields[0], fields[2], kind, charset, page, problem)


def _parse_http(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by lower-case name, and the body with its gzip or deflate coding undone."""
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        head, _, body = data.partition(b"\n\n")
    first, *lines = head.decode("latin-1").splitlines() or [""]
    parts = first.split()
    status = int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("content-encoding") in ("gzip", "deflate"):
        try:
            body = zlib.decompressobj(47).decompress(body, 64 << 20)
        except zlib.error:
            body = b""
    return status, headers, body


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
