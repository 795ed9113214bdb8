"""Curation held to judgements from outside: extraction labels, human quality labels, translations of known languages.

Every part reads the shared data, takes seconds to minutes, and writes its figures into `--out` as JSON; a part whose figures are there is
passed over, so the program can be stopped and started again. The page is docs/results/curation.md.

    python experiments/curation_outside.py --out curation_outside.json
"""

import argparse
import json
import lzma
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from regrowth.data_pipeline import transform_config as tc
from regrowth.data_pipeline.document import Raw, to_batches
from regrowth.data_pipeline.source_config import HtmlSource
from regrowth.data_pipeline.sources.web import Extractor
from regrowth.data_pipeline.transforms import choosing, prose
from regrowth.files import write_json

DATA = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a packed file of the shared data."""
    with lzma.open(DATA / name, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def squeezed(text: str) -> str:
    """Text with all white space as single spaces."""
    return " ".join(text.split())


def segments(extract: Callable[[str], str]) -> dict[str, float]:
    """Pages labelled with segments that must and must not be there: precision, recall and F1 over segments."""
    there = missed = wrong = right = 0
    for row in rows("web/html_labelled.jsonl.xz"):
        if row["label_kind"] == "segments":
            text = squeezed(extract(row["html"]))
            for segment in row["must_contain"]:
                there, missed = there + (squeezed(segment) in text), missed + (squeezed(segment) not in text)
            for segment in row["must_not_contain"]:
                wrong, right = wrong + (squeezed(segment) in text), right + (squeezed(segment) not in text)
    return _scores(there, wrong, missed)


def article_bodies(extract: Callable[[str], str]) -> dict[str, float]:
    """Pages labelled with their whole article: precision, recall and F1 over 4-word shingles, averaged over pages."""
    scores = []
    for row in rows("web/html_labelled.jsonl.xz"):
        if row["label_kind"] == "article_body":
            wanted, found = (_shingles(text) for text in (row["article_body"], extract(row["html"])))
            both = (wanted & found).total()
            scores.append((both / max(found.total(), 1), both / max(wanted.total(), 1)))
    precision, recall = (sum(score[k] for score in scores) / len(scores) for k in (0, 1))
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


def _shingles(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return Counter(tuple(words[i : i + 4]) for i in range(max(len(words) - 3, 0)))


def _scores(there: int, wrong: int, missed: int) -> dict[str, float]:
    precision, recall = there / max(there + wrong, 1), there / max(there + missed, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-9)}


def extraction() -> dict[str, Any]:
    """Ours beside its two libraries used bare."""
    from resiliparse.extract.html2text import extract_plain_text

    extractors: dict[str, Callable[[str], str]] = {
        "regrowth (resiliparse)": Extractor(HtmlSource(kind="html", path=".")).text,
        "resiliparse, all text": lambda html: extract_plain_text(html, main_content=False),
    }
    try:
        extractors["regrowth (trafilatura)"] = Extractor(HtmlSource(kind="html", path=".", extractor="trafilatura")).text
        import trafilatura

        extractors["trafilatura, as it comes"] = lambda html: trafilatura.extract(html) or ""
    except Exception as error:
        print(f"skipped: trafilatura ({error})")
    extractors["resiliparse, as it comes"] = lambda html: extract_plain_text(html, main_content=True)
    return {name: {"segments": segments(extract), "articles": article_bodies(extract)} for name, extract in extractors.items()}


def quality_labels() -> dict[str, Any]:
    """Documents that people called good or bad: what share of each the rules keep."""
    filters = {
        "gopher_quality": prose.GopherQualityFilter(tc.GopherQuality(kind="gopher_quality")),
        "gopher_repetition": prose.GopherRepetitionFilter(tc.GopherRepetition(kind="gopher_repetition")),
        "c4": prose.C4Rules(tc.C4(kind="c4")),
        "fineweb": prose.FineWebFilter(tc.FineWeb(kind="fineweb")),
    }
    result: dict[str, Any] = {}
    for name in ("majority", "agreement"):
        documents = list(rows(f"web/quality_labels_dclm_{name}.jsonl.xz"))
        ((batch, _),) = to_batches([Raw(d["text"], "d", str(i)) for i, d in enumerate(documents)], bytes_per_batch=1 << 60)
        labels = [bool(d["label"]) for d in documents]
        result[name] = {"documents": len(labels), "good": sum(labels)}
        everything = set(range(len(labels)))
        for rule, transform in filters.items():
            kept = {int(i) for i in _kept_rows(transform, batch)}
            everything &= kept
            result[name][rule] = _agreement(kept, labels)
        result[name]["all four"] = _agreement(everything, labels)
    return result


def _kept_rows(transform: Any, batch: Any) -> list[int]:
    order = {identity: row for row, identity in enumerate(batch.column("id").to_pylist())}
    kept, _ = transform(batch)
    return [order[identity] for identity in kept.column("id").to_pylist()]


def _agreement(kept: set[int], labels: list[bool]) -> dict[str, float]:
    good, bad = labels.count(True), labels.count(False)
    return {
        "kept of good": sum(labels[i] for i in kept) / good,
        "kept of bad": sum(not labels[i] for i in kept) / bad,
        "agreement": sum((i in kept) == label for i, label in enumerate(labels)) / len(labels),
    }


# ISO 639-3 codes of the declaration's files and how py3langid spells those languages.
LANGUAGES = dict(pair.split(":") for pair in ["abk:ab", "ast:ast", "azj:az", "bam:bm", "ben:bn", "bul:bg", "ces:cs", "cym:cy", "epo:eo", "fin:fi", "fra:fr", "gle:ga", "hat:ht", "hau:ha", "hin:hi", "hrv:hr", "ibo:ig", "ind:id", "isl:is", "kal:kl", "kan:kn", "kat:ka", "kaz:kk", "khm:km", "kin:rw", "kor:ko", "lat:la", "lav:lv", "lit:lt", "lug:lg", "mal:ml", "mlt:mt", "mri:mi", "nld:nl", "nno:nn", "oci:oc", "pan:pa", "por:pt", "ron:ro", "rus:ru", "slk:sk", "sme:se", "spa:es", "swe:sv", "tam:ta", "tgk:tg", "tur:tr", "ukr:uk", "urd:ur", "vie:vi", "wol:wo", "xho:xh", "als:sq", "bre:br"])  # fmt: skip


def languages() -> dict[str, Any]:
    """The declaration of human rights in languages that the identifier knows: how many it names right."""
    transform = choosing.LanguageFilter(tc.Language(kind="language"))
    known = set(map(str, transform._langid.labels))
    right, wrong = 0, []
    for row in rows("corpora/multilingual_udhr.jsonl.xz"):
        code = LANGUAGES.get(row["lang"].split("_")[0])
        if code is None or code not in known:
            continue
        ((named, _),) = transform.identify([row["text"]])
        right += named == code
        if named != code:
            wrong.append(f"{row['lang']} as {named}")
    return {"languages": right + len(wrong), "right": right, "wrong": wrong}


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("curation_outside.json"))
    arguments = parser.parse_args()
    if not (DATA / "web").is_dir():
        print(f"skipped: needs the shared data {DATA} (set REGROWTH_SHARED_DATA)")
        sys.exit(0)
    figures = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for part in (quality_labels, languages, extraction):
        if part.__name__ not in figures:
            print(part.__name__, "...", flush=True)
            figures[part.__name__] = part()
            write_json(arguments.out, figures)
    print(json.dumps(figures, indent=1, default=lambda value: round(value, 4)))


if __name__ == "__main__":
    main()
