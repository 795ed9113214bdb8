"""Web archives and pages: every record is a document or has a reason, and a cut-off one is noticed."""

import gzip
import io
from collections import Counter
from pathlib import Path

import pytest

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import HtmlSource, WarcSource
from regrowth.data_pipeline.sources.web import HtmlFiles, WarcFiles

PAGE = "<html><head><title>t</title></head><body><nav>Home | About</nav><main><p>{}</p></main></body></html>"
STORY = "This is the story of page number {}, told in a sentence that is long enough to count as the main content of its page."


def read(source: WarcFiles | HtmlFiles) -> list[Raw]:
    return [document for item in source.items(1 << 26) for document in source.read(item)]


def warc_record(kind: str, url: str, body: bytes, content_type: str) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\nWARC-Record-ID: <urn:uuid:{abs(hash(url))}>\r\n"
    return head.encode() + f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def response(url: str, page: bytes, status: str = "200 OK", content_type: str = "text/html; charset=utf-8") -> bytes:
    http = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(page)}\r\n\r\n".encode() + page
    return warc_record("response", url, http, "application/http; msgtype=response")


def pages(count: int) -> list[bytes]:
    return [response(f"https://site.org/{i}", PAGE.format(STORY.format(i)).encode()) for i in range(count)]


@pytest.mark.parametrize("packed", [False, True])
def test_pages_become_text_with_their_address_and_offset(packed: bool, tmp_path: Path) -> None:
    records = [gzip.compress(r) if packed else r for r in pages(5)]
    path = tmp_path / f"a.warc{'.gz' if packed else ''}"
    path.write_bytes(b"".join(records))
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.text for d in found] == [STORY.format(i) for i in range(5)]
    assert [d.meta["url"] for d in found] == [f"https://site.org/{i}" for i in range(5)]
    offset = sum(len(r) for r in records[:3])
    assert found[3].source == f"{path}@{offset}"
    again = gzip.decompress(path.read_bytes()[offset:]) if packed else path.read_bytes()[offset:]
    assert b"https://site.org/3" in again[:200], "the record can be fetched again by its offset"


def test_what_is_no_page_has_a_reason(tmp_path: Path) -> None:
    records = [
        response("https://a.org/404", b"gone", "404 Not Found"),
        response("https://a.org/img", b"\x89PNG", content_type="image/png"),
        response("https://a.org/empty", b""),
        response("https://a.org/scripts", b"<html><body><script>x()</script></body></html>"),
        response(
            "https://a.org/latin", PAGE.format("Caf\u00e9 cr\u00e8me " * 9).encode("latin-1"), content_type="text/html; charset=iso-8859-1"
        ),
        response("https://a.org/plain", b"just plain text", content_type="text/plain"),
        warc_record("response", "dns:a.org", b"1.2.3.4", "text/dns"),
        warc_record("conversion", "https://a.org/wet", b"text of a WET record", "text/plain"),
        response("https://a.org/huge", b"x" * 2_000_000),
    ]
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path), max_page_megabytes=1)))
    assert [d.dropped for d in found] == ["http_status", "not_a_page", "empty_page", "no_text", "", "", "", "page_too_large"]
    assert found[4].text.startswith("Café crème") and [d.text for d in found[5:7]] == ["just plain text", "text of a WET record"]


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_that_ends_in_a_record_keeps_the_others_and_says_so(packed: bool, tmp_path: Path) -> None:
    records = [gzip.compress(r) if packed else r for r in pages(6)]
    whole = b"".join(records)
    (tmp_path / f"a.warc{'.gz' if packed else ''}").write_bytes(whole[: len(whole) - len(records[-1]) // 3])
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.text for d in found if not d.dropped] == [STORY.format(i) for i in range(5)]
    assert [d.dropped for d in found if d.dropped] in (["truncated_record"], ["damaged_file"])


def test_damage_in_the_middle_of_an_archive_is_reported_with_its_place(tmp_path: Path) -> None:
    records = [gzip.compress(r) for r in pages(6)]
    data = bytearray(b"".join(records))
    start = sum(map(len, records[:3]))
    data[start + 20 : start + 60] = bytes(40)
    (tmp_path / "a.warc.gz").write_bytes(bytes(data))
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.text for d in found if not d.dropped][:3] == [STORY.format(i) for i in range(3)]
    assert any(d.dropped in ("damaged_file", "truncated_record") for d in found)


def arc(count: int) -> bytes:
    version = b"1 0 InternetArchive\nURL IP-address Archive-date Content-type Archive-length\n"
    out = io.BytesIO()
    out.write(f"filedesc://x.arc 0.0.0.0 20080430204825 text/plain {len(version)}\n".encode() + version + b"\n")
    for i in range(count):
        body = b"HTTP/1.0 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + PAGE.format(STORY.format(i)).encode()
        out.write(f"http://old.org/{i} 1.2.3.4 20080430204825 text/html {len(body)}\n".encode() + body + b"\n")
    return out.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_arc_files_are_read_and_their_damage_is_told(packed: bool, tmp_path: Path) -> None:
    def pack(data: bytes) -> bytes:
        return gzip.compress(data) if packed else data

    name = f"a.arc{'.gz' if packed else ''}"
    (tmp_path / name).write_bytes(pack(arc(4)))
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.text for d in found] == [STORY.format(i) for i in range(4)] and found[2].meta["url"] == "http://old.org/2"
    (tmp_path / name).write_bytes(pack(arc(4)[:-100]))
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.dropped for d in found] == ["", "", "", "truncated_record"]
    (tmp_path / name).write_bytes(pack(arc(2) + b"this is no header line at all\n"))
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.dropped for d in found] == ["", "", "damaged_file"]


def test_the_real_archives_are_read_to_their_end(shared_data: Path) -> None:
    found = read(WarcFiles(WarcSource(kind="warc", path=str(shared_data / "web/warc"))))
    reasons = Counter(d.dropped for d in found)
    assert reasons[""] > 100 and not reasons["damaged_file"] and not reasons["truncated_record"]
    assert all(d.text.strip() for d in found if not d.dropped)


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_html_files_by_either_extractor(extractor: str, tmp_path: Path) -> None:
    pytest.importorskip(extractor)
    long = " ".join(STORY.format(i) for i in range(6))
    (tmp_path / "good.html").write_text(PAGE.format(long))
    (tmp_path / "empty.htm").write_text("")
    found = read(HtmlFiles(HtmlSource(kind="html", path=str(tmp_path), extractor=extractor)))  # type: ignore[arg-type]
    assert {Path(d.source).name: d.dropped for d in found} == {"good.html": "", "empty.htm": "empty_page"}
    (good,) = (d for d in found if not d.dropped)
    assert long[:60] in good.text and "Home | About" not in good.text


def test_extraction_finds_the_labelled_text_of_real_pages(shared_data: Path) -> None:
    """Recall of segments that must be there, and precision against those that must not (figures: docs/results/curation.md)."""
    import json
    import lzma

    from regrowth.data_pipeline.sources.web import Extractor

    extractor = Extractor(HtmlSource(kind="html", path="."))
    there = missed = wrong = 0
    with lzma.open(shared_data / "web/html_labelled.jsonl.xz", "rt", encoding="utf-8") as rows:
        for line in rows:
            row = json.loads(line)
            if row["label_kind"] != "segments":
                continue
            text = extractor.text(row["html"])
            there += sum(segment in text for segment in row["must_contain"])
            missed += sum(segment not in text for segment in row["must_contain"])
            wrong += sum(segment in text for segment in row["must_not_contain"])
    assert there / (there + missed) > 0.75 and there / (there + wrong) > 0.7


def test_bodies_are_decoded_as_their_servers_coded_them(tmp_path: Path) -> None:
    page = PAGE.format(STORY.format(1)).encode()
    chunked = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (50, page[:50], len(page) - 50, page[50:])

    def http(headers: str, body: bytes) -> bytes:
        return f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{headers}\r\n\r\n".encode() + body

    bodies = [
        http("Content-Encoding: gzip", gzip.compress(page)),
        http("Transfer-Encoding: chunked", chunked),
        http("Content-Encoding: gzip", page),  # an archive that undid it and kept the header
        http("Transfer-Encoding: chunked", page),
        http("Content-Encoding: gzip", gzip.compress(page)[:20]),
        http("Content-Encoding: br", b"\x1b\x02\x00\xf8"),
    ]
    records = [warc_record("response", f"https://a.org/{i}", body, "application/http") for i, body in enumerate(bodies)]
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.text for d in found[:4]] == [STORY.format(1)] * 4
    assert found[4].dropped and found[5].dropped == "coded_br"


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_cut_in_a_record_header_says_so(packed: bool, tmp_path: Path) -> None:
    records = pages(3)
    tail = records[2][:60]
    data = b"".join(gzip.compress(r) if packed else r for r in records[:2]) + (gzip.compress(records[2])[:30] if packed else tail)
    (tmp_path / f"a.warc{'.gz' if packed else ''}").write_bytes(data)
    found = read(WarcFiles(WarcSource(kind="warc", path=str(tmp_path))))
    assert [d.text for d in found if not d.dropped] == [STORY.format(i) for i in range(2)] and found[-1].dropped == "damaged_file"
