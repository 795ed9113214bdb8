"""Filters that ask about language, address, classifiers, word lists and evaluation sets; transforms that mend and mask."""

import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from regrowth.data_pipeline import transform_config as tc
from regrowth.data_pipeline.document import Raw, to_batches
from regrowth.data_pipeline.transforms import choosing, cleaning
from regrowth.data_pipeline.transforms.base import append_score, score_of
from regrowth.data_pipeline.transforms.fasttext_score import FastTextScorer, lines_of, load_fasttext, probabilities
from regrowth.errors import UserError
from tests.conftest import prose, write_jsonl


def batch_of(*texts: str, **meta: list) -> pa.RecordBatch:
    rows = [Raw(text, "d", str(i), {key: values[i] for key, values in meta.items()}) for i, text in enumerate(texts)]
    ((batch, _),) = to_batches(rows, bytes_per_batch=1 << 60)
    return batch


def outcome(transform: object, batch: pa.RecordBatch) -> tuple[list[str], list[str]]:
    """Kept texts and drop reasons."""
    kept, dropped = transform(batch)  # type: ignore[operator]
    return kept.column("text").to_pylist(), dropped.column("reason").to_pylist() if dropped is not None else []


def test_scores_are_added_in_order_and_read_back() -> None:
    batch = batch_of("a", "b", "c")
    scores = append_score(batch.column("scores"), "first", np.array([0.1, 0.2, 0.3]))
    scores = append_score(scores.slice(1), "second", np.array([5.0, 6.0]))
    assert [[(k, round(v, 6)) for k, v in row] for row in scores.to_pylist()] == [
        [("first", 0.2), ("second", 5.0)],
        [("first", 0.3), ("second", 6.0)],
    ]
    assert score_of(scores, "second").tolist() == [5.0, 6.0] and score_of(scores, "none", -1).tolist() == [-1, -1]


def test_language_names_and_keeps(shared_data: Path) -> None:
    texts = [
        "The quick brown fox jumps over the lazy dog, and everybody in the town is happy about it today.",
        "Der schnelle braune Fuchs springt über den faulen Hund, und alle in der Stadt freuen sich darüber.",
        "Le renard brun et rapide saute par-dessus le chien paresseux, et tout le monde en ville est heureux.",
    ]
    transform = choosing.LanguageFilter(tc.Language(kind="language", keep=["en", "fr"]))
    kept, dropped = transform(batch_of(*texts))
    assert kept.column("text").to_pylist() == [texts[0], texts[2]]
    assert [json.loads(m)["language"] for m in kept.column("meta").to_pylist()] == ["en", "fr"]
    assert dropped is not None and dropped.column("reason").to_pylist() == ["language_de"]
    assert (score_of(kept.column("scores"), "language") > 0.9).all()


def test_language_of_the_declaration_of_human_rights(shared_data: Path) -> None:
    """Translations whose language the identifier knows: nearly all are named right."""
    codes = {"eng": "en", "deu": "de", "fra": "fr", "spa": "es", "ita": "it", "por": "pt", "nld": "nl", "swe": "sv", "fin": "fi", "pol": "pl", "ces": "cs",
             "hun": "hu", "ron": "ro", "bul": "bg", "rus": "ru", "ukr": "uk", "ell": "el", "tur": "tr", "arb": "ar", "heb": "he", "hin": "hi", "ben": "bn",
             "tam": "ta", "tha": "th", "vie": "vi", "ind": "id", "kor": "ko", "jpn": "ja", "cmn": "zh"}  # fmt: skip
    found = []
    with lzma.open(shared_data / "corpora/multilingual_udhr.jsonl.xz", "rt", encoding="utf-8") as rows:
        for line in rows:
            row = json.loads(line)
            if (code := row["lang"].split("_")[0]) in codes:
                found.append((codes[code], row["text"]))
    assert len(found) > 15
    transform = choosing.LanguageFilter(tc.Language(kind="language"))
    named = [code for code, _ in transform.identify([text for _, text in found])]
    assert np.mean([a == b for a, (b, _) in zip(named, found, strict=True)]) > 0.9


def test_url_rules_know_hosts_addresses_and_words(tmp_path: Path) -> None:
    for name, lines in (("domains", "# bad hosts\nbad.org\n"), ("urls", "https://fine.org/but/not/this\n"), ("words", "casino\n")):
        (tmp_path / name).write_text(lines)
    config = {key: str(tmp_path / key) for key in ("domains", "urls", "words")}
    urls = ["https://fine.org/a", "http://www.bad.org/x", "https://deep.bad.org", "https://notbad.org/", "http://fine.org/but/not/this/",
            "https://x.com/casino-tips", "https://x.com/casinos", None, "http://[broken"]  # fmt: skip
    expected = ["", "blocked_domain", "blocked_domain", "", "blocked_url", "blocked_word", "", "", ""]
    transform = choosing.UrlRules(tc.UrlFilter.model_validate({"kind": "url", **config}))
    assert [transform.reason(url) for url in urls] == expected
    kept, reasons = outcome(transform, batch_of("a", "b", url=["https://fine.org/a", "http://bad.org"]))
    assert kept == ["a"] and reasons == ["blocked_domain"]
    assert choosing.UrlRules(tc.UrlFilter(kind="url", require_url=True)).reason(None) == "no_url"
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no entry"):
        choosing.UrlRules(tc.UrlFilter(kind="url", domains=str(tmp_path / "empty")))


def test_blocked_words_match_whole_words_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("foo bar\nqux\n性\n")
    transform = choosing.BlockedWordsFilter(tc.BlockedWords(kind="blocked_words", path=str(tmp_path / "words")))
    texts = ["a Foo Bar here", "foobar and quxes", "QUX", "一性一", "über-qux", "clean"]
    assert outcome(transform, batch_of(*texts)) == (["foobar and quxes", "clean"], ["blocked_words"] * 4)


def test_a_fasttext_classifier_scores_and_drops(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext", reason="needs the fasttext extra")
    lines = [f"__label__1 {prose(i, 3)}" for i in range(200)] + [
        f"__label__0 {' '.join('xyzw'[i % 4] * 3 for i in range(k, k + 30))}" for k in range(200)
    ]
    (tmp_path / "train.txt").write_text("\n".join(line.replace("\n", " ") for line in lines))
    fasttext.train_supervised(str(tmp_path / "train.txt"), epoch=10, wordNgrams=2, thread=1, verbose=0).save_model(str(tmp_path / "m.bin"))
    good, bad = prose(999, 4), " ".join(["xxx yyy zzz"] * 20)
    scorer = FastTextScorer(tc.FastTextScore(kind="fasttext", model=str(tmp_path / "m.bin")))
    kept, dropped = scorer(batch_of(good, bad))
    assert dropped is None and len(kept) == 2
    scores = score_of(kept.column("scores"), "quality")
    assert scores[0] > 0.9 > 0.1 > scores[1]
    odd = [good, "", "a\n\nb", "nul \0 and \r\x85 \u2028", "__label__1 x", "naïve 漢字 🙂", bad, "\n"]
    labels, said = scorer._model.predict([text.replace("\n", " ") for text in odd[1:-1]], k=-1)
    wanted = [dict(zip(names, values, strict=True)).get("__label__1", 0.0) for names, values in zip(labels, said, strict=True)]
    part: pa.LargeStringArray = batch_of("before", *odd).column("text").slice(2, 6)  # pyright: ignore[reportAssignmentType]
    assert probabilities(scorer._model, part, "__label__1").tolist() == wanted, "as the library itself says"
    assert lines_of(part, hide_labels=True)[3] == b"__label_ _1 x\n"
    assert lines_of(pa.array(["x", "ab", "c"]).slice(1)) == [b"ab\n", b"c\n"]  # pyright: ignore[reportArgumentType]
    assert lines_of(pa.array([], pa.large_string())) == [] and lines_of(pa.array(["", ""], pa.large_string())) == [b"\n", b"\n"]
    strict = FastTextScorer(tc.FastTextScore(kind="fasttext", model=str(tmp_path / "m.bin"), min_score=0.5, name="taste"))
    assert outcome(strict, batch_of(good, bad)) == ([good], ["low_taste"])
    with pytest.raises(UserError, match=r"__label__9.*has the labels"):
        FastTextScorer(tc.FastTextScore(kind="fasttext", model=str(tmp_path / "m.bin"), label="__label__9"))
    (tmp_path / "no.bin").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a fastText model"):
        load_fasttext(str(tmp_path / "no.bin"), "data.transforms.model")


def test_evaluation_items_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    item = "Which of the following planets of the solar system is known to be the largest one of all?"
    short = "A body at rest stays at rest for ever"  # nine words: compared whole
    write_jsonl(tmp_path / "evals/a.jsonl", [{"query": item}, {"query": "too short"}, {"choices": [short]}])
    transform = choosing.Decontaminator(tc.Decontaminate(kind="decontaminate", path=str(tmp_path / "evals")))
    shouted = item.upper().replace(" ", "  ").replace("?", "!")
    texts = [
        prose(1, 20),
        f"{prose(2, 5)} {shouted} {prose(3, 5)}",
        " ".join(item.split()[:12]),
        f"{short}, said he.",
        f"{prose(4, 5)} {item}",
    ]
    kept, dropped = transform(batch_of(*texts))
    assert kept.column("text").to_pylist() == [texts[0], texts[2]]
    assert dropped is not None and dropped.column("reason").to_pylist() == ["overlap"] * 3
    assert [json.loads(m)["overlap"]["file"] for m in dropped.column("meta").to_pylist()] == ["a.jsonl"] * 3
    assert json.loads(dropped.column("meta")[0].as_py())["overlap"]["ngrams"] == len(item.split()) - 12
    assert (
        transform.counts["documents that hold a.jsonl"] == 3
        and transform.unchecked == 1
        and transform.note.startswith("1 of 3 evaluation texts")
    )


def test_decontamination_agrees_with_a_slow_search_on_real_evaluation_sets(shared_data: Path) -> None:
    transform = choosing.Decontaminator(
        tc.Decontaminate(kind="decontaminate", path=str(shared_data / "evals/arc_easy.jsonl.xz"), fields=["query"])
    )
    with lzma.open(shared_data / "evals/arc_easy.jsonl.xz", "rt", encoding="utf-8") as rows:
        items = [json.loads(line)["query"] for line in rows]
    long = [item for item in items if len(item.split()) >= 16][:40]
    hidden = [f"{prose(i, 9)} {item} {prose(1000 + i, 9)}" for i, item in enumerate(long)]
    clean = [prose(5000 + i, 20) for i in range(40)]
    kept, reasons = outcome(transform, batch_of(*hidden, *clean))
    assert kept == clean and reasons == ["overlap"] * len(hidden)


def test_broken_encodings_are_repaired_and_plain_text_is_left_alone() -> None:
    transform = cleaning.UnicodeRepair(tc.FixUnicode(kind="fix_unicode"))
    kept, _ = outcome(transform, batch_of("voilÃ  le caf\u00c3\u00a9", "plain ascii", "a &amp; b", "日本語"))
    assert kept == ["voilà le café", "plain ascii", "a & b", "日本語"]
    gentle = cleaning.UnicodeRepair(tc.FixUnicode(kind="fix_unicode", uncurl_quotes=False))
    assert outcome(gentle, batch_of("“so” it’s"))[0] == ["“so” it’s"]


def test_page_furniture_goes_and_prose_that_mentions_it_stays() -> None:
    page = "Home\nSkip to main content\nCookies are small pieces of text, and this long sentence explains in prose what they do for the reader of pages.\nThe story.\nShare on Facebook\n\nIt ends here.\nAll rights reserved."
    transform = cleaning.BoilerplateLines(tc.Boilerplate(kind="boilerplate", max_removed_fraction=0.7))
    kept, reasons = outcome(transform, batch_of(page, "Home\nLogin\nMenu\nA line."))
    assert kept == [
        "Cookies are small pieces of text, and this long sentence explains in prose what they do for the reader of pages.\nThe story.\n\nIt ends here."
    ]
    assert reasons == ["mostly_boilerplate"] and transform.counts["lines"] == 7
    with pytest.raises(UserError, match="not a regular expression"):
        cleaning.BoilerplateLines(tc.Boilerplate(kind="boilerplate", patterns=["("]))


@pytest.mark.parametrize(
    ("text", "masked", "counts"),
    [
        ("write to jane.doe+x@mail.example.co.uk now", "write to email@example.com now", {"emails": 1}),
        ("at 8.8.8.8 and 10.0.0.1, 192.168.1.1", "at 192.0.2.1 and 10.0.0.1, 192.168.1.1", {"ips": 1}),
        ("version 1.2.3.4.5 and 300.1.1.1", "version 1.2.3.4.5 and 300.1.1.1", {}),
        ("call (555) 867-5309 or +49 30 1234567.", "call 555-0100 or 555-0100.", {"phones": 2}),
        (
            "212-555-0187 is one; 2024-01-02, 1234567890 and 3.14159 are not",
            "555-0100 is one; 2024-01-02, 1234567890 and 3.14159 are not",
            {"phones": 1},
        ),
        ("nothing @ all", "nothing @ all", {}),
    ],
)
def test_personal_data_is_masked_and_counted(text: str, masked: str, counts: dict) -> None:
    transform = cleaning.MaskPersonalData(tc.MaskPii(kind="mask_pii"))
    kept, _ = transform(batch_of("before", text, "after"))
    assert kept.column("text").to_pylist() == ["before", masked, "after"]
    assert json.loads(kept.column("meta")[1].as_py()).get("pii", {}) == counts
    assert {k: v for k, v in transform.counts.items() if v} == counts
