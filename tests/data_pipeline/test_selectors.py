"""Selectors: each held to its formula, or to what it has to find; all through the pipeline, with keep_best behind them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.document import Raw, to_batches
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.select import config as known
from regrowth.data_pipeline.select.by_model import gaussian_odds, stepwise_odds
from regrowth.data_pipeline.select.classifier import one_line, train_classifier
from regrowth.data_pipeline.select.config import FastTextTraining, Losses, SelectorChoice
from regrowth.data_pipeline.select.measures import average_precision, best_threshold, calibration_error, fit_platt, platt, roc_auc
from regrowth.data_pipeline.select.pool import Pool
from regrowth.data_pipeline.select.selector import chances, fit_selector, load_selector
from regrowth.errors import UserError
from tests.conftest import program, prose, small_data_values, write_jsonl
from tests.data_pipeline.small_model import build

FAST = {"buckets": 20_000, "dim": 16, "lr": 0.5, "epochs": 10}


def batch_of(texts: list[str]) -> pa.RecordBatch:
    return next(iter(to_batches([Raw(text, "web", f"place/{n}") for n, text in enumerate(texts)])))[0]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, Pool]:
    """A pool of prose and programs, of which the target is programs."""
    folder = tmp_path_factory.mktemp("corpora")
    rows = [{"text": prose(n, 4 + n % 20), "url": f"http://prose{n % 5}.org/{n}"} for n in range(120)]
    rows += [{"text": program(n, 4 + n % 12), "url": f"http://code{n % 3}.org/{n}"} for n in range(60)]
    write_jsonl(folder / "pool" / "web.jsonl", rows)
    write_jsonl(folder / "target" / "code.jsonl", [{"text": program(1000 + n, 8)} for n in range(60)])
    pools = []
    for name in ("pool", "target"):
        values = {**small_data_values(folder / name, folder / "out"), "name": name, "transforms": [{"kind": "normalise"}]}
        pools.append(Pool(prepare(DataConfig.model_validate(values)).folder))
    return pools[0], pools[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one tokenizer, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    return [build(folder / str(seed), seed=seed, text=prose(1, 40)) for seed in range(3)] + [build(folder / "other", text=program(1, 60))]


def selector_of(values: dict[str, Any]) -> Any:
    return SelectorChoice.model_validate({"selectors": {"one": values}}).selectors["one"]


def is_code(batch: pa.RecordBatch) -> np.ndarray:
    return np.array(["code" in json.loads(meta)["url"] for meta in batch.column("meta").to_pylist()])


def whole(pool: Pool) -> pa.RecordBatch:
    return pa.Table.from_batches(list(pool.batches())).combine_chunks().to_batches()[0]


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "classifier", "training": FAST},
        {"kind": "classifier", "training": {**FAST, "calibrate": True, "quantise": True}},
        {"kind": "importance"},
        {"kind": "importance", "per_ngram": True, "chance": False},
    ],
    ids=["classifier", "calibrated", "importance", "per_ngram"],
)
def test_what_is_like_the_target_scores_higher(corpora: tuple[Pool, Pool], tmp_path: Path, values: dict[str, Any]) -> None:
    selector = fit_selector(selector_of(values), tmp_path / "s", *corpora)
    documents = whole(corpora[0])
    scores = load_selector(tmp_path / "s", "path").score(documents)
    np.testing.assert_array_equal(scores, selector.score(documents))
    assert roc_auc(scores, is_code(documents)) > 0.97
    if values["kind"] == "classifier":
        findings = selector.describe()["findings"]
        assert findings["roc_auc"] > 0.8, "a third of what it calls unwanted is wanted"
        assert ("quantised" in findings) == values["training"].get("quantise", False)
        assert selector.describe()["cost"]["flops"] > 0


def test_a_classifier_is_the_same_each_time_and_wherever_it_is_trained(corpora: tuple[Pool, Pool], tmp_path: Path) -> None:
    config = selector_of({"kind": "classifier", "training": FAST})
    marks = [fit_selector(config, tmp_path / name, *corpora).describe()["mark"] for name in "ab"]
    assert marks[0] == marks[1]


def test_what_was_fitted_is_not_fitted_again_nor_overwritten(corpora: tuple[Pool, Pool], tmp_path: Path) -> None:
    config = selector_of({"kind": "classifier", "training": FAST})
    fit_selector(config, tmp_path / "s", *corpora)
    before = (tmp_path / "s" / "model.bin").stat().st_mtime_ns
    fit_selector(config, tmp_path / "s", *corpora)
    assert (tmp_path / "s" / "model.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"fitted to something else \(config\)"):
        fit_selector(selector_of({"kind": "classifier", "training": {**FAST, "epochs": 4}}), tmp_path / "s", *corpora)
    (tmp_path / "s" / "model.bin").write_bytes(b"changed")
    with pytest.raises(UserError, match=r"model.bin: has changed since"):
        load_selector(tmp_path / "s", "path")


def test_perplexity_prefers_what_it_is_told_to(corpora: tuple[Pool, Pool], models: list[Path], tmp_path: Path) -> None:
    documents = whole(corpora[0])
    losses = {"cache": str(tmp_path / "losses.sqlite"), "device": "cpu"}
    scores = {}
    for prefer in ("low", "high", "gaussian", "stepwise"):
        config = selector_of({"kind": "perplexity", "model": str(models[0]), "prefer": prefer, "losses": losses, "sample": 100})
        scores[prefer] = fit_selector(config, tmp_path / prefer, *corpora).score(documents)
    np.testing.assert_array_equal(scores["low"], -scores["high"])
    quartiles = json.loads((tmp_path / "gaussian" / "quartiles.json").read_text())
    for prefer, odds in (("gaussian", gaussian_odds), ("stepwise", stepwise_odds)):
        wanted = odds(np.exp(scores["high"]), quartiles, 4.5) / chances(documents, 0)
        np.testing.assert_allclose(scores[prefer], wanted)


def test_bertins_odds_by_their_published_values() -> None:
    at = np.array([0, 0.5, 1, 2, 3, 5]) * 7.0
    np.testing.assert_allclose(0.78 * gaussian_odds(at, [5.0, 7.0, 9.0]), [0.6246, 0.7378, 0.78, 0.6246, 0.3207, 0.0223], atol=5e-5)
    np.testing.assert_allclose(1.5e5 * stepwise_odds(np.array([1e5, 6e5, 8e5, 1e6]), [5e5, 7e5, 9e5]), [0.3, 0.75, 0.75, 1 / 60])


def test_draws_by_odds_keep_what_the_odds_say(tmp_path: Path) -> None:
    """The greatest of odds / chance: with few kept of many, twice the odds are kept twice as often."""
    documents = batch_of([f"document {n}" for n in range(40_000)])
    odds = np.where(np.arange(40_000) % 2 == 0, 2.0, 1.0)
    kept = np.argsort(-odds / chances(documents, 3))[:1500]
    assert (kept % 2 == 0).mean() == pytest.approx(2 / 3, abs=0.04)
    uniform = chances(documents, 3)
    assert (
        np.abs(np.sort(uniform) - (np.arange(40_000) + 0.5) / 40_000).max() < 0.01
        and abs(np.corrcoef(uniform, chances(documents, 4))[0, 1]) < 0.02
    )


def test_the_difference_of_two_models_is_that_of_their_losses(corpora: tuple[Pool, Pool], models: list[Path], tmp_path: Path) -> None:
    losses = {"cache": str(tmp_path / "losses.sqlite"), "device": "cpu"}
    config = selector_of({"kind": "difference", "teacher": str(models[0]), "reference": str(models[1]), "losses": losses})
    scores = fit_selector(config, tmp_path / "s", *corpora).score(whole(corpora[0]))
    back = selector_of({"kind": "difference", "teacher": str(models[1]), "reference": str(models[0]), "losses": losses})
    np.testing.assert_allclose(fit_selector(back, tmp_path / "b", *corpora).score(whole(corpora[0])), -scores)
    assert np.std(scores) > 0
    other = selector_of({"kind": "difference", "teacher": str(models[0]), "reference": str(models[3]), "losses": losses})
    with pytest.raises(UserError, match="have different tokenizers"):
        fit_selector(other, tmp_path / "o", *corpora)


def models_file(folder: Path, models: list[Path]) -> Path:
    rows = [f'[[models]]\nname = "m{n}"\npath = "{path}"\nscores = {{code = {n}, other = {-n}}}\n' for n, path in enumerate(models)]
    (folder / "models.toml").write_text("".join(rows))
    return folder / "models.toml"


def test_preselect_learns_what_foretells(corpora: tuple[Pool, Pool], models: list[Path], tmp_path: Path) -> None:
    """The models say nothing of code; what counts is that the labels are the formula's and that all ways through are the same."""
    values = {"kind": "preselect", "models_file": str(models_file(tmp_path, models)), "target": "code", "groups": 6, "documents": 20,
              "losses": {"cache": str(tmp_path / "losses.sqlite"), "device": "cpu"}, "positive_share": 0.4, "training": FAST}  # fmt: skip
    selector = fit_selector(selector_of(values), tmp_path / "s", *corpora)
    record = selector.describe()
    findings = record["findings"]
    assert findings["groups"] == 6 and findings["documents"] > 60 and 0 < findings["mean_strength"] < 1
    assert list(findings["models"]) == ["m0", "m1", "m2", "m3"] and record["cost"]["flops"] > 0
    groups = json.loads((tmp_path / "s" / "groups.json").read_text())
    assert list(groups.values()) == sorted(groups.values(), reverse=True)
    strength = np.load(tmp_path / "s" / "strength.npy")
    assert set(np.round(strength * 6).astype(int)) <= set(range(7)) and np.allclose(strength * 6, np.round(strength * 6))
    # The pool may bring its strength along, from a transform that had its work spread over processes.
    source = corpora[0].pipeline.config
    with_strength = {"kind": "strength", "models_file": values["models_file"], "target": "code", "losses": values["losses"]}
    scored = source.model_copy(update={"name": "scored", "transforms": [*source.transforms]})
    scored = DataConfig.model_validate({**scored.model_dump(mode="json"), "transforms": [{"kind": "normalise"}, with_strength]})
    pool = Pool(prepare(scored).folder)
    again = fit_selector(selector_of(values), tmp_path / "again", pool, None)
    assert again.describe()["findings"]["from"].startswith("the pool's score strength")
    np.testing.assert_allclose(np.load(tmp_path / "again" / "strength.npy"), strength, rtol=1e-6)
    assert (tmp_path / "again" / "model.bin").read_bytes() == (tmp_path / "s" / "model.bin").read_bytes()
    assert pool.pipeline.score_names == ["strength", "bpc_m0", "bpc_m1", "bpc_m2", "bpc_m3"]
    assert again.describe()["cost"]["flops"] > record["cost"]["flops"], "the whole pool was scored, not a sample"
    with pytest.raises(UserError, match="a strength of other models, scores or settings"):
        fit_selector(selector_of({**values, "target": "other"}), tmp_path / "others", pool, None)


def test_preselect_labels_groups_or_asks_for_confidence(corpora: tuple[Pool, Pool], models: list[Path], tmp_path: Path) -> None:
    values = {"kind": "preselect", "models_file": str(models_file(tmp_path, models[:3])), "target": "code", "per": "host", "documents": 30,
              "losses": {"cache": str(tmp_path / "losses.sqlite"), "device": "cpu"}, "training": {**FAST, "epochs": 1}}  # fmt: skip
    grouped = fit_selector(selector_of({**values, "labels": "group"}), tmp_path / "g", *corpora)
    sure, plain = (
        fit_selector(selector_of({**values, "positive_share": 0.4, "confidence": c, "weights": "gaps"}), tmp_path / f"c{c}", *corpora)
        for c in (0.9, 0.0)
    )
    counts = [s.describe()["findings"]["examples_of_each_class"] for s in (grouped, plain, sure)]
    assert min(counts) >= 8 and counts[2] < counts[1]
    with pytest.raises(ValueError, match="whole in every bootstrap"):
        selector_of({**values, "confidence": 0.9})


def test_preselect_says_when_no_document_foretells(corpora: tuple[Pool, Pool], models: list[Path], tmp_path: Path) -> None:
    same = models_file(tmp_path, [models[0], models[0]])  # two names, one model: all its losses tie
    values = {
        "kind": "preselect",
        "models_file": str(same),
        "target": "code",
        "losses": {"cache": str(tmp_path / "l.sqlite"), "device": "cpu"},
    }
    with pytest.raises(UserError, match=r"no document is positive: of \d+ documents the strength is 0.000 to 0.000"):
        fit_selector(selector_of(values), tmp_path / "s", *corpora)
    assert not (tmp_path / "s" / "selector.json").exists()


def test_a_regression_finds_what_embeddings_know(corpora: tuple[Pool, Pool], models: list[Path], tmp_path: Path) -> None:
    rows = [{"text": prose(5000 + n, 6), "score": n % 2} for n in range(40)] + [
        {"text": program(5000 + n, 6), "score": 4 + n % 2} for n in range(40)
    ]
    labelled = write_jsonl(tmp_path / "labelled.jsonl", rows)
    config = selector_of({"kind": "regression", "model": str(models[0]), "labelled": str(labelled), "device": "cpu", "ridge": 0.1})
    selector = fit_selector(config, tmp_path / "s", *corpora)
    assert selector.describe()["findings"]["r_squared"] > 0.5
    documents = whole(corpora[0])
    assert roc_auc(selector.score(documents), is_code(documents)) > 0.97
    write_jsonl(labelled, [{**row, "score": "high"} for row in rows])
    with pytest.raises(UserError, match="score = 'high' is no number"):
        fit_selector(config, tmp_path / "t", *corpora)


def test_lengths_are_matched_and_nothing_else(corpora: tuple[Pool, Pool], tmp_path: Path) -> None:
    other = fit_selector(selector_of({"kind": "classifier", "training": FAST}), tmp_path / "other", *corpora)
    config = selector_of({"kind": "length_matched", "like": str(tmp_path / "other"), "fraction": 0.2})
    matched = fit_selector(config, tmp_path / "s", *corpora)
    documents = whole(corpora[0])
    lengths = np.array([len(text) for text in documents.column("text").to_pylist()])

    def kept(scores: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores)
        return order[np.cumsum(lengths[order]) - lengths[order] < 0.2 * lengths.sum()]

    wanted, like = kept(other.score(documents)), kept(matched.score(documents))
    assert abs(np.log(lengths[like].mean() / lengths[wanted].mean())) < abs(np.log(lengths.mean() / lengths[wanted].mean())) / 2
    assert matched.describe()["findings"]["mean_characters_kept"] == pytest.approx(lengths[wanted].mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "letter"),
    [
        ([{"text": "a", "label": 1}] * 20, "its labels are 1; positive_label = 1 and at least one other"),
        ([{"text": "a", "label": "x\ny"}], r"label = 'x\\ny': a label with a line break"),
        ([{"text": "a"}], "has no field label; it has text"),
        ([{"words": "a", "label": 1}], "no object with a text"),
        ([{"text": f"t {n}", "label": n == 0} for n in range(40)], "the classifier has 0 positive|positive_label = 1 and"),
        ([{"text": f"t {n}", "label": int(n == 0)} for n in range(40)], "the classifier has 1 positive examples"),
    ],
)
def test_labels_that_teach_nothing_are_refused(corpora: tuple[Pool, Pool], tmp_path: Path, rows: list[dict], letter: str) -> None:
    config = selector_of({"kind": "classifier", "labelled": str(write_jsonl(tmp_path / "l.jsonl", rows)), "training": FAST})
    with pytest.raises(UserError, match=letter):
        fit_selector(config, tmp_path / "s", *corpora)


def test_a_selector_of_the_target_needs_one(corpora: tuple[Pool, Pool], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"importance is fitted to the target's text; give the recipe a \[target\]"):
        fit_selector(selector_of({"kind": "importance"}), tmp_path / "s", corpora[0], None)


def test_text_that_looks_like_a_label_is_none(tmp_path: Path) -> None:
    assert one_line("a\nb __label__1\n\ud800") == "a b __label_ _1 ?"
    good = [f"__label__0 fine words {n} here \ud800" for n in range(40)]
    bad = [f"__label__1 other\rthings\0 {n} there" for n in range(40)]
    findings = train_classifier(good, bad, FastTextTraining(**FAST), tmp_path)  # pyright: ignore[reportArgumentType]
    assert findings["roc_auc"] == 1.0


def test_measures_agree_with_another_implementation() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn (a part of the eval extra)")
    rng = np.random.default_rng(0)
    wanted = rng.random(500) < 0.3
    scores = np.round(np.clip(rng.normal(0.4 + 0.2 * wanted, 0.2), 0.01, 0.99), 2)  # with ties
    assert roc_auc(scores, wanted) == pytest.approx(metrics.roc_auc_score(wanted, scores))
    assert average_precision(scores, wanted) == pytest.approx(metrics.average_precision_score(wanted, scores))
    f1 = [metrics.f1_score(wanted, scores >= threshold) for threshold in np.unique(scores)]
    assert metrics.f1_score(wanted, scores >= best_threshold(scores, wanted)) == pytest.approx(max(f1))


def test_calibration_says_what_is_so() -> None:
    rng = np.random.default_rng(1)
    true = rng.random(20_000)
    wanted = rng.random(20_000) < true
    said = 1 / (1 + np.exp(-3 * np.log(true / (1 - true))))  # three times too sure
    slope, offset = fit_platt(said, wanted)
    assert slope == pytest.approx(1 / 3, abs=0.03) and offset == pytest.approx(0, abs=0.05)
    assert calibration_error(platt(said, slope, offset), wanted) < 0.02 < 0.1 < calibration_error(said, wanted)


def test_a_recipe_selects_with_a_fitted_selector(corpora: tuple[Pool, Pool], tmp_path: Path) -> None:
    """Score in one segment, cut behind it; what is kept is code, and the shards carry the score."""
    fit_selector(selector_of({"kind": "classifier", "training": FAST}), tmp_path / "code", *corpora)
    source = corpora[0].pipeline.config.model_dump(mode="json")
    transforms = [{"kind": "normalise"}, {"kind": "exact_dedup"}, {"kind": "selector", "path": str(tmp_path / "code")},
                  {"kind": "keep_best", "score": "code", "fraction": 0.2}]  # fmt: skip
    config = DataConfig.model_validate({**source, "transforms": transforms, "name": "kept", "out": str(tmp_path / "out")})
    pipeline = Pipeline.open(prepare(config).folder)
    assert pipeline.phases and pipeline.score_names == ["code"]
    kept = [
        json.loads(meta)["url"]
        for part in pipeline.parts.present()
        for b in pipeline.parts.kept(part)
        for meta in b.column("meta").to_pylist()
    ]
    assert len(kept) > 10 and all("code" in url for url in kept)
    assert pipeline.counts()["selector"]["code: megaflops"] >= 0
    above = [{"kind": "normalise"}, {"kind": "selector", "path": str(tmp_path / "code"), "name": "p", "min_score": 0.5}]
    config = DataConfig.model_validate({**source, "transforms": above, "name": "above", "out": str(tmp_path / "out")})
    funnel = Pipeline.open(prepare(config).folder).funnel()
    assert funnel["web", "selector", "low_p"][0] > 60 and funnel["web", "selector", ""][0] > 30
    (tmp_path / "code" / "selector.json").unlink()
    with pytest.raises(UserError, match=r"data.transforms.1.path = .*: no fitted selector is here"):
        Pipeline.plan_of(config)


def test_a_corpus_is_the_same_whoever_takes_its_losses(corpora: tuple[Pool, Pool], models: list[Path], tmp_path: Path) -> None:
    """The same corpus folder, whatever device, batch or cache is named."""
    source = corpora[0].pipeline.config.model_dump(mode="json")
    roots = []
    for changes in ({"batch_tokens": 512}, {"batch_tokens": 4096, "at_once": 1, "cache": str(tmp_path / "other.sqlite")}):
        losses = {"cache": str(tmp_path / "one.sqlite"), "device": "cpu", **changes}
        strength = {"kind": "strength", "models_file": str(models_file(tmp_path, models)), "target": "code", "losses": losses}
        roots.append(Pipeline.plan_of(DataConfig.model_validate({**source, "transforms": [{"kind": "normalise"}, strength]})).root)
    assert roots[0] == roots[1]


def test_a_model_that_changed_since_the_fit_is_found_out(corpora: tuple[Pool, Pool], tmp_path: Path) -> None:
    path = build(tmp_path / "model")
    config = selector_of({"kind": "perplexity", "model": str(path), "losses": {"cache": str(tmp_path / "l.sqlite"), "device": "cpu"}})
    fit_selector(config, tmp_path / "s", *corpora)
    mark = load_selector(tmp_path / "s", "path").describe()["mark"]
    path = path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the model model = .* is gone or has changed"):
        load_selector(tmp_path / "s", "path")
    fit_selector(config.model_copy(update={"model": str(path)}), tmp_path / "s", *corpora)
    assert load_selector(tmp_path / "s", "path").describe()["mark"] == mark, "the same selector, which knows now where its model is"
    build(path, seed=9)
    with pytest.raises(UserError, match=r"the model model = .* is gone or has changed"):
        load_selector(tmp_path / "s", "path")


def test_a_sample_is_as_large_as_it_can_be_and_no_relation_of_what_was_kept_at_random(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw" / "web.jsonl", [{"text": f"document {n} " * 5} for n in range(4000)])
    best = {"kind": "keep_best", "score": "random", "fraction": 0.1, "of": "documents"}
    values = {**small_data_values(tmp_path / "raw", tmp_path / "out"), "transforms": [{"kind": "normalise"}, best], "heldout_fraction": 0.4}
    pool = Pool(prepare(DataConfig.model_validate(values)).folder)
    there = sum(len(batch) for batch in pool.batches())
    assert 180 < there < 300 and len(pool.sample(there, seed=0)) == there and len(pool.sample(10**6, seed=0)) == there
    assert len(pool.sample(50, seed=0)) == 50
    assert set(pool.sample(50, seed=0).texts) != set(pool.sample(50, seed=1).texts)


def test_accuracy_counts_ties_by_halves_and_numbers_alone(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from regrowth.data_pipeline.select.choices import accuracy, read_items
    from regrowth.data_pipeline.select.loss_model import LossModel

    rows = [{"sentence_good": "a fine sentence", "sentence_bad": "a fine sentence"}, {"query": "Question: q", "choices": ["same", "same", "same"], "gold": 2},
            {"context_options": ["He", "She"], "continuation": "went", "gold": 1}, {"activity_and_ctx": "x", "endings": ["y", "z"], "label": 1},
            {"question": "q", "choice0": "a", "choice1": "b", "answer": "1"}]  # fmt: skip
    items = read_items(write_jsonl(tmp_path / "sets.jsonl", rows))
    model = LossModel(str(models[0]), Losses(device="cpu"), "model")
    assert accuracy(model, items[:2]) == (pytest.approx((1 / 2 + 1 / 3) / 2), pytest.approx((1 / 2 + 1 / 3) / 2))
    answers = [a for item in items[2:] for a in item.answers]
    assert answers[0] == ("He", " went") and answers[2] == ("x", " y") and answers[4] == ("Question: q\nAnswer:", " a")
    broken = build(tmp_path / "broken")
    llama = AutoModelForCausalLM.from_pretrained(broken)
    llama.lm_head.weight.data.fill_(float("nan"))
    llama.save_pretrained(broken)
    with pytest.raises(UserError, match="are no numbers"):
        accuracy(LossModel(str(broken), Losses(device="cpu"), "model"), items)
    with pytest.raises(UserError, match="no multiple-choice item of a known form"):
        read_items(write_jsonl(tmp_path / "bad.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 2}]))


def test_defaults_are_the_published_ones() -> None:
    config = known.PreSelect(kind="preselect", models_file=Path("m.toml"))
    assert (config.training.epochs, config.training.lr, config.training.word_ngrams, config.groups, config.documents) == (
        3,
        0.1,
        2,
        3000,
        300,
    )
    assert (Losses().window, Losses().stride) == (1900, 512)
    dclm = known.Classifier(kind="classifier").training
    assert (dclm.epochs, dclm.lr, dclm.dim, dclm.word_ngrams, dclm.min_count) == (5, 0.1, 100, 2, 1)
