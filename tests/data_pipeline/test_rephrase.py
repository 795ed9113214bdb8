"""Rephrasing end to end against a server: prompts, chunks, what is taken of an answer and what is not, and the corpus that comes out."""

import collections
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from regrowth.data_pipeline.batch import split_sample_id
from regrowth.data_pipeline.config import DataConfig, LoaderConfig
from regrowth.data_pipeline.corpus import SPLITS, Corpus
from regrowth.data_pipeline.document import Raw, to_batches
from regrowth.data_pipeline.loader import Loader
from regrowth.data_pipeline.mixing.config import OdmMixing, StaticMixing
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.rephrase.cache import Answer
from regrowth.data_pipeline.rephrase.choose import drawn, styles_of
from regrowth.data_pipeline.rephrase.chunks import chunks, estimated_tokens
from regrowth.data_pipeline.rephrase.clean import clean, copied_share, some_pairs
from regrowth.data_pipeline.rephrase.collapse import collapse
from regrowth.data_pipeline.rephrase.language import LanguageCheck
from regrowth.data_pipeline.rephrase.prompts import After, load_prompt, shipped
from regrowth.data_pipeline.transform_config import Rephrase
from regrowth.data_pipeline.transforms.base import with_columns
from regrowth.errors import UserError
from tests.data_pipeline.test_rephrase_client import server

SOURCE = (
    "The bridge over the Aare was built in 1466. It has burned twice, in 1471 and in 1908, and the town of Olten paid for it each time."
)


def test_every_style_ships_and_asks_for_its_text() -> None:
    assert {
        "easy",
        "medium",
        "hard",
        "qa",
        "wiki",
        "diverse_qa",
        "distill",
        "extract_knowledge",
        "knowledge_list",
        "math",
        "table",
        "faq",
        "tutorial",
    } == set(shipped())
    for style in shipped():
        prompt = load_prompt(style)
        payload = prompt.payload("a {text} with braces")
        assert "a {text} with braces" in payload["messages"][-1]["content"] and payload["max_tokens"] >= prompt.after.min_tokens
        assert prompt.after.prefix in payload["messages"][-1]["content"], "what is demanded is asked for"


def test_prompts_of_ones_own_and_their_faults(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\nversion = 3\ntemplate = "Sing: {text}"\n')
    assert load_prompt("mine", tmp_path).mark == "mine@3"
    (tmp_path / "other.toml").write_text('name = "other"\ntemplate = "Sing: {txt}"\n')
    with pytest.raises(UserError, match=r'other\.toml.*one place for the text, written "\{text\}"'):
        load_prompt("other", tmp_path)
    (tmp_path / "third.toml").write_text('name = "mine"\ntemplate = "{text}"\n')
    with pytest.raises(UserError, match='give the prompt the name of its file, "third"'):
        load_prompt("third", tmp_path)
    with pytest.raises(UserError, match=r"prompts = .*nowhere: there is no such folder"):
        load_prompt("easy", tmp_path / "nowhere")
    with pytest.raises(UserError, match='there is no prompt "esay"; did you mean "easy"'):
        load_prompt("esay", tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", ". ", "\n", "! ", "?", "漢", "。", "é", " " * 30, "\n\n"]), max_size=300).map("".join),
    st.integers(2, 40),
)
def test_chunks_cover_a_text_and_none_is_too_long(text: str, most: int) -> None:
    found = chunks(text, most)
    assert "".join("".join(text[c.begin : c.end].split()) for c in found) == "".join(text.split())
    assert all(estimated_tokens(text[c.begin : c.end]) <= most for c in found)
    assert all(a.end <= b.begin for a, b in itertools.pairwise(found))


def test_chunks_end_where_paragraphs_and_sentences_do() -> None:
    paragraph = "One sentence of some words. Another one follows it! Is this the third?"
    text = "\n\n".join([paragraph] * 4)
    for chunk in chunks(text, 45):
        assert text[chunk.begin : chunk.end] in ("\n\n".join([paragraph] * 2), paragraph)
    assert {text[c.begin : c.end] for c in chunks(paragraph, 10)} == {
        "One sentence of some words.",
        "Another one follows it!",
        "Is this the third?",
    }


@pytest.mark.parametrize(
    ("said", "after", "text", "reason"),
    [
        ("Sure, here's a paraphrase of the text:\n\nOlten's bridge dates from 1466 and burned in 1471 and in 1908.", {}, "Olten's bridge dates from 1466 and burned in 1471 and in 1908.", ""),
        ("Here is the rewritten text: Olten's bridge dates from the year of 1466, and has been rebuilt.", {}, "Olten's bridge dates from the year of 1466, and has been rebuilt.", ""),
        ("Here are three reasons: money, fire and water, which rule all the bridges of that land.", {}, "Here are three reasons: money, fire and water, which rule all the bridges of that land.", ""),
        ("# A bridge\n\n**Olten** paid for `it` each time, and [people](http://a.b) still *do* so, they say.\n\nI hope this helps!", {}, "A bridge\n\nOlten paid for it each time, and people still do so, they say.", ""),
        ("Sure! I'd be happy to help.\n\nHere is the text in other words:\n\nOlten's bridge dates from 1466, says the chronicle.", {}, "Olten's bridge dates from 1466, says the chronicle.", ""),
        ("OK Go is a band of four from Chicago, formed in the year of 1998 by two friends.", {}, "OK Go is a band of four from Chicago, formed in the year of 1998 by two friends.", ""),
        ("Certainly the bridge of Olten is old: it burned in more than one century, it is told.", {}, "Certainly the bridge of Olten is old: it burned in more than one century, it is told.", ""),
        ("Here are the ingredients of the bread:\n- flour of rye\n- water from the well\n- salt", {}, "Here are the ingredients of the bread:\nflour of rye\nwater from the well\nsalt", ""),
        ("In `__init__`, the snake__case__name is a**b**c, which is **bold** of you, they say.", {}, "In __init__, the snake__case__name is a**b**c, which is bold of you, they say.", ""),
        ("**In short:** the bridge burned twice and was paid for twice by the town of Olten.", {"prefix": "In short:"}, "the bridge burned twice and was paid for twice by the town of Olten.", ""),
        ("“The old bridge of Olten, built before the printing press came, burned twice.”", {}, "The old bridge of Olten, built before the printing press came, burned twice.", ""),
        ("I'm sorry, but I cannot help with that request about bridges and fires in towns.", {}, None, "refusal"),
        ("In short: the bridge burned twice and was paid for twice by the town of Olten.", {"prefix": "In short:"}, "the bridge burned twice and was paid for twice by the town of Olten.", ""),
        ("The bridge burned twice and was paid for twice by the town of Olten.", {"prefix": "In short:"}, None, "no_prefix"),
        ("Question: When?\nNo answer to this is known to any of us, whoever we may be.", {"must_hold": ["Question:", "Answer:"]}, None, "form"),
        ("It burned.", {}, None, "too_short"),
        (SOURCE, {}, None, "copied"),
        ("The bridge of Olten is old and has burned twice since it was built, it is told.", {"keep_numbers": 0.5}, None, "numbers_lost"),
        ("That crossing is from 1466, burned in 1471 and 1908, and a town paid for all of it.", {"keep_names": 0.5}, None, "names_lost"),
    ],
)  # fmt: skip
def test_what_is_taken_of_an_answer(said: str, after: dict[str, object], text: str | None, reason: str) -> None:
    source = SOURCE.replace("the town of Olten", "the town, Olten,")
    source = (
        SOURCE if reason == "copied" else source.replace("the town, Olten,", "its town, called Olten,").replace("called Olten", "of Olten")
    )
    got = clean(Answer(said, "stop"), source, After.model_validate(after))
    assert got == (said if text is None else text, reason)


def test_answers_that_are_cut_off_or_errors_are_none() -> None:
    assert clean(Answer("Olten's bridge dates from", "length"), SOURCE, After())[1] == "cut_off"
    assert clean(Answer(error="status 400: too long"), SOURCE, After()) == ("status 400: too long", "rejected")
    assert clean(Answer(error="status 500", transient=True), SOURCE, After()) == ("status 500", "error")
    assert copied_share(SOURCE, SOURCE) == 1 and copied_share("a b", SOURCE) == 0


def recipe(tmp_path: Path, url: str, **rephrase: object) -> DataConfig:
    (tmp_path / "in").mkdir(exist_ok=True)
    rows = [{"text": f"{SOURCE} This is text number {i} of all. " * 8} for i in range(30)] + [{"text": "TOO LONG for every server. " * 12}]
    (tmp_path / "in/towns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    transform = {"kind": "rephrase", "server": {"urls": [url], "model": "small", "first_wait_seconds": 0.02, "timeout_seconds": 60.0},
                 "cache": str(tmp_path / "answers.sqlite"), "styles": {"medium": 3, "own": 1}, "prompts": str(tmp_path), **rephrase}  # fmt: skip
    (tmp_path / "own.toml").write_text('name = "own"\ntemplate = "Say it otherwise: {text}"\nlevel = 5\nchunk_tokens = 64\n')
    values = {"out": str(tmp_path / "out"), "sources": [{"kind": "jsonl", "path": str(tmp_path / "in")}], "workers": 1, "transforms": [transform],
              "tokenizer": {"vocabulary": 300}, "heldout_fraction": 0.2}  # fmt: skip
    return DataConfig.model_validate(values)


def splits_of(corpus: Corpus, domain: str) -> dict[str, str]:
    """The split of each document of a domain, by its source."""
    found = {}
    for split in SPLITS:
        for shard in corpus.shards(split, domain):
            for block in range(len(shard.index.blocks)):
                found |= {lineage[0]: split for lineage in shard.table(block).column("lineage").to_pylist()}
    return found


def test_what_changes_texts_stands_before_the_rephrasing(tmp_path: Path) -> None:
    made = recipe(tmp_path, "http://127.0.0.1:9/v1").model_dump(mode="json")
    with pytest.raises(ValidationError, match="normalise stands behind rephrase, and would change texts"):
        DataConfig.model_validate({**made, "transforms": [*made["transforms"], {"kind": "normalise"}]})
    with pytest.raises(ValidationError, match="has a place for something else than"):
        recipe(tmp_path, "http://127.0.0.1:9/v1", domain="{source}_anew")


def test_a_corpus_of_real_and_rephrased_documents(tmp_path: Path) -> None:
    with server(tmp_path, "--faults", "0.2", "--kinds", "429,500,no_choices,not_json") as running:
        corpus = prepare(recipe(tmp_path, running.url))
        asked = sum(running.answered().values())
        assert set(corpus.domains) == {"towns", "towns_rephrased"}
        documents = {
            domain: sum(row["documents"] for split in corpus.manifest["splits"].values() for row in split.get(domain, []))
            for domain in corpus.domains
        }
        assert documents == {"towns": 31, "towns_rephrased": 30}
        reasons = {(transform, reason): documents for _, transform, reason, documents, _ in corpus.manifest["funnel"] if reason}
        assert set(reasons) == {("rephrase", "rejected")}, "what no server took is told, chunk by chunk"
        counted = corpus.manifest["counts"]["rephrase"]
        assert counted["medium: good"] + counted["own: good"] == asked and counted["completion tokens"] > 0
        splits = {domain: splits_of(corpus, domain) for domain in corpus.domains}
        for source, split in splits["towns_rephrased"].items():
            assert splits["towns"][source.partition("#rephrase=")[0]] == split, "what is held out is not trained on in other words"
        assert set(splits["towns_rephrased"].values()) == {"train", "heldout"}
        # Documents that nobody asked for stay, and what is left out is told.
        alone = prepare(recipe(tmp_path, running.url, keep_source=False, domains=["other"]))
        assert set(alone.domains) == {"towns"}
        # Another corpus of the same documents costs nothing, whoever would have answered.
        without = prepare(recipe(tmp_path, "http://127.0.0.1:9/v1", keep_source=False))
        left_out = {reason: documents for _, _, reason, documents, _ in without.manifest["funnel"] if reason.startswith(("reph", "no_"))}
        assert set(without.domains) == {"towns_rephrased"} and left_out == {"rephrased": 30, "no_rephrase": 1}
        assert sum(running.answered().values()) == asked


def rephrase(**settings: object) -> Rephrase:
    return Rephrase.model_validate({"kind": "rephrase", "server": {"urls": ["http://127.0.0.1:9/v1"], "model": "m"}, **settings})


def test_the_style_of_a_document_is_chosen_by_its_domain_its_score_and_weights() -> None:
    documents = [Raw(f"text {i}", domain, f"made@{domain}{i}") for domain in ("web", "wiki", "code") for i in range(400)]
    (batch, _), *_ = to_batches(documents)
    scores = pa.array([[("quality", i % 20)] if i % 40 else [] for i in range(len(batch))], batch.schema.field("scores").type)
    batch = with_columns(batch, scores=scores)
    config = rephrase(
        styles={"easy": 1.0},
        rules=[
            {"domains": ["code"]},  # left as they are
            {"score": "quality", "at_least": 11, "styles": {"diverse_qa": 3.0, "distill": 1.0}},
            {"score": "quality", "below": 11, "domains": ["web"], "styles": {"wiki": 1.0}},
        ],
    )
    found = styles_of(batch, config)
    for row, style in enumerate(found):
        domain, score = batch.column("domain")[row].as_py(), row % 20 if row % 40 else None
        if domain == "code":
            assert style == ""
        elif score is not None and score >= 11:
            assert style in ("diverse_qa", "distill")
        else:
            assert style == ("wiki" if score is not None and domain == "web" else "easy"), "a document without the score fits no rule of it"
    assert 2.2 < found.count("diverse_qa") / found.count("distill") < 4.2
    assert styles_of(batch, config) == found and set(styles_of(batch, rephrase(domains=["wiki"]))) == {"", "medium"}
    assert drawn("a", {}) == "" and config.all_styles == ["easy", "diverse_qa", "distill", "wiki"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"server": None}, "either .server. .urls, model. or .local. .path."),
        ({"local": {"path": "x"}}, "either .server. .urls, model. or .local. .path."),
        ({"rules": [{"at_least": 0.5, "styles": {"wiki": 1}}]}, "at_least and below are bounds of a score"),
        ({"styles": {}}, "neither styles nor rules name a style"),
        ({"server": {"model": "m"}}, "name the servers .urls = "),
        ({"server": {"model": "m", "start": {"command": ["vllm", "serve"]}}}, 'no word of it has "{port}" in it'),
    ],
)
def test_what_is_wrong_with_a_rephrasing_is_told(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        rephrase(**settings)


def test_some_of_the_questions_are_kept_by_the_length_of_the_source_in_an_order_that_is_drawn() -> None:
    pairs = [f"Question: What is {i}?\nA) one\nB) two\nAnswer: It is {i}." for i in range(8)]
    text = "Some words before.\n\n" + "\n\n".join(pairs)
    drawn_pairs = [some_pairs(text, 150, str(seed)).split("\n\n") for seed in range(300)]
    assert {len(its) for its in drawn_pairs} == set(range(1, 9)), "between 1 and ten for each 150 tokens, of the eight that there are"
    assert all(set(its) <= set(pairs) and len(set(its)) == len(its) for its in drawn_pairs) and len({its[0] for its in drawn_pairs}) == 8
    assert some_pairs(text, 150, "7") == some_pairs(text, 150, "7") and some_pairs(text, 14, "1").count("Question:") == 1
    assert {len(some_pairs(text, 45, str(seed)).split("\n\n")) for seed in range(100)} == {1, 2, 3}
    assert load_prompt("diverse_qa").after.some_pairs
    assert some_pairs("Question and answer: none. Answer: Question: neither.", 150, "1") == ""
    assert some_pairs("(1) Question: a?\nAnswer: b.\nB. Question: a?\nAnswer: b.", 14, "1").count("Answer:") == 1


def test_a_rephrase_in_another_language_is_found_and_one_that_is_too_short_to_tell_is_let_be() -> None:
    pytest.importorskip("py3langid", reason="needs the extra rephrase")
    german = "Die Brücke über die Aare wurde im Jahr 1466 gebaut und ist seither zweimal abgebrannt, wofür die Stadt jedes Mal bezahlt hat."
    same = LanguageCheck("same")
    assert same.wrong(SOURCE, german) and same.wrong(german, SOURCE) and not same.wrong(german, german) and not same.wrong(SOURCE, SOURCE)
    assert not same.wrong(SOURCE, "Zwei Brände.") and not same.wrong("Olten", german)
    assert LanguageCheck("de").wrong(german, SOURCE) and not LanguageCheck("de").wrong(SOURCE, german)


def test_a_style_that_has_become_a_template_shows() -> None:
    varied = [
        ("easy", f"id{i}", f"Bridge {i} has {i * 7} planks, {'and' * (i % 5)} each of them number {i * 13} tells of town {i * 3}.")
        for i in range(200)
    ]
    template = [("faq", f"id{i}", f"In this text we learn about {i}. It is important to note that {i} is {i * 2}.") for i in range(150)]
    easy, faq = collapse([*varied, *template, *(("faq", f"x{i}", f"{i} stands alone") for i in range(50))])
    assert (easy.style, easy.documents, faq.documents, faq.looked_at) == ("easy", 200, 200, 200)
    assert faq.openings[0] == ("in this text", 0.75) and dict(faq.runs)["it is important to note"] == 0.75 and faq.is_suspicious
    assert (
        faq.distinct_openings == pytest.approx(51 / 200)
        and easy.distinct_openings == 1
        and not any(share > 0.2 for _, share in easy.openings)
    )
    assert collapse([]) == [] and collapse([("qa", "a", "two words")])[0].runs == []
    assert not collapse(template[:5])[0].is_suspicious, "five documents say nothing"
    few = collapse(template, most=40)[0]
    assert (few.documents, few.looked_at) == (150, 40) and few.openings[0][1] == 1.0
    assert collapse(reversed(template), most=40) == [few], "which ones are looked at does not depend on their order"


def test_real_and_synthetic_streams_of_each_style_are_mixed_as_any_domains_are(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        corpus = prepare(recipe(tmp_path, running.url, domain="{domain}_{style}", language="any"))
    assert corpus.domains == ["towns", "towns_medium", "towns_own"]
    config = LoaderConfig(sequence_length=64, global_batch=8, unit_sequences=1, seed=7)
    weights = {"towns": 0.5, "towns_medium": 0.375, "towns_own": 0.125}  # WRAP's 1:1, the synthetic half by styles
    loader = Loader(corpus, config, StaticMixing(weights=weights))
    drawn_domains = collections.Counter(split_sample_id(sample)[0] for step in range(50) for sample in loader.plan_step(step))
    assert [drawn_domains[number] / 400 for number in range(3)] == pytest.approx([0.5, 0.375, 0.125], abs=0.08)
    bandit = Loader(corpus, config, OdmMixing(policy="odm", warmup_steps=2))
    for step in range(80):  # the bandit goes where the loss is high: here, to one of the styles
        domains = {split_sample_id(sample)[0] for sample in bandit.plan_step(step)}
        bandit.observe(step, {domain: 6.0 if domain == 1 else 1.0 for domain in domains})
    later = collections.Counter(split_sample_id(sample)[0] for step in range(80, 110) for sample in bandit.plan_step(step))
    assert later[1] > later[0] and later[1] > later[2]
