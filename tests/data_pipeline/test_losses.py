"""Losses of models on documents: the same as one plain pass over each, taken once, and predictive strength by its formula."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrowth.data_pipeline.select.config import Losses
from regrowth.data_pipeline.select.loss_model import LossModel
from regrowth.data_pipeline.select.loss_store import LossStore
from regrowth.data_pipeline.select.strength import bootstrap_confidence, group_means, load_models, predictive_strength
from regrowth.data_pipeline.select.windows import windows
from regrowth.errors import UserError
from tests.conftest import prose
from tests.data_pipeline.small_model import build

TEXTS = [prose(seed, 1 + seed) for seed in range(9)] + ["", "a", "Ünïcödé ☃ and 汉字 in a row", "x" * 700]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model"), text=prose(1, 40))


def settings_at(folder: Path, **changes: Any) -> Losses:
    return Losses(cache=folder / "losses.sqlite", device="cpu", **changes)


def plain_losses(path: Path, text: str, window: int, stride: int) -> tuple[float, int]:
    """One document, one token after the other, each with the context that its window gives it; nats and tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, llama = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats = 0.0
    for place in range(1, len(ids)):
        # The window that takes this token's loss: the first, or the one that ends a whole number of strides behind it.
        stop = min(window, len(ids)) if place < window else min(window + stride * ((place - window) // stride + 1), len(ids))
        begin = max(0, stop - window)
        with torch.no_grad():
            logits = llama(torch.tensor([ids[begin:place]])).logits[0, -1].double()
        nats -= float(logits.log_softmax(-1)[ids[place]])
    return nats, len(ids) - 1


@given(st.integers(0, 5000), st.integers(2, 600), st.data())
def test_every_token_has_its_loss_once_and_context_when_it_can(tokens: int, window: int, data: Any) -> None:
    stride = data.draw(st.integers(1, window - 1))
    found = windows(tokens, window, stride)
    scored = [place for w in found for place in range(w.scored, w.stop)]
    assert scored == list(range(1, tokens))
    for w in found:
        assert 0 <= w.begin < w.scored and w.stop - w.begin <= window
        assert w.begin == 0 or w.scored - w.begin >= window - stride


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (40, 13), (40, 39)])
def test_batches_of_windows_give_what_one_token_at_a_time_gives(model: Path, tmp_path: Path, window: int, stride: int) -> None:
    """fp32 in another order of additions: 1e-5 relative."""
    scored = LossModel(str(model), settings_at(tmp_path, window=window, stride=stride, batch_tokens=300), "model").score(TEXTS)
    for row in (0, 4, 10, 11, 12):
        nats, tokens = plain_losses(model, TEXTS[row], window, stride)
        assert scored.tokens[row] == tokens and scored.characters[row] == len(TEXTS[row])
        assert scored.nats[row] == pytest.approx(nats, rel=1e-5)
    assert np.isnan(scored.nats[9]), "an empty document has no loss"


def test_what_stands_beside_a_document_changes_nothing(model: Path, tmp_path: Path) -> None:
    judge = LossModel(str(model), settings_at(tmp_path, window=64, stride=32), "model")
    together = judge.score(TEXTS).nats
    alone = np.concatenate([judge.score([text]).nats for text in TEXTS])
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_tokenizer_without_a_first_token_predicts_from_the_second_on(tmp_path: Path) -> None:
    path = build(tmp_path / "model", text=prose(1, 40), begin=False)
    text = TEXTS[3]
    scored = LossModel(str(path), settings_at(tmp_path), "model").score([text, "a"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    coded = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([coded["input_ids"]])
    with torch.no_grad():
        nats = float(AutoModelForCausalLM.from_pretrained(path)(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert scored.nats[0] == pytest.approx(nats, rel=1e-5)
    assert scored.characters[0] == len(text) - coded["offset_mapping"][0][1] and np.isnan(scored.nats[1])


def test_a_longer_window_than_the_models_context_is_cut(tmp_path: Path) -> None:
    path = build(tmp_path / "model", context=32)
    judge = LossModel(str(path), settings_at(tmp_path), "model")
    assert judge.score([TEXTS[5]]).nats[0] == pytest.approx(plain_losses(path, TEXTS[5], 32, 32 * 512 // 1900)[0], rel=1e-5)


def test_losses_are_taken_once_whoever_asks(model: Path, tmp_path: Path) -> None:
    hashes = [text.encode()[:16] for text in TEXTS]
    first = LossStore([("model", str(model))], settings_at(tmp_path))
    losses = first.losses(TEXTS, hashes)
    assert first.counts["model tokens"] == losses.tokens.sum() > 0
    second = LossStore([("model", str(model))], settings_at(tmp_path))
    again = second.losses(TEXTS[::-1], hashes[::-1])
    assert not second.counts and second.models[0]._model is None
    assert second.flops == first.flops > 2 * losses.tokens.sum(), "what is cached is not free"
    np.testing.assert_array_equal(again.nats[0, ::-1], losses.nats[0])
    assert not np.isnan(losses.bits_per_character[0, :9]).any()
    narrower = LossStore([("model", str(model))], settings_at(tmp_path, window=64, stride=32))
    narrower.losses(TEXTS, hashes)
    assert narrower.counts["model tokens"], "another window is another loss"


def test_models_that_do_not_fit_together_are_loaded_one_after_the_other(model: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", seed=7)
    hashes = [text.encode()[:16] for text in TEXTS]
    alone = LossStore([("a", str(model)), ("b", str(other))], settings_at(tmp_path / "one", at_once=1))
    both = LossStore([("a", str(model)), ("b", str(other))], settings_at(tmp_path / "all"))
    np.testing.assert_array_equal(alone.losses(TEXTS, hashes).nats, both.losses(TEXTS, hashes).nats)
    assert [m._model is None for m in alone.models] == [True, False] and not any(m._model is None for m in both.models)


def test_a_killed_process_keeps_what_it_had_taken(model: Path, tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from pathlib import Path
        from regrowth.data_pipeline.select import loss_store
        from regrowth.data_pipeline.select.config import Losses
        loss_store._KEPT_CHARACTERS = 2000
        store = loss_store.LossStore([("model", {str(model)!r})], Losses(cache=Path({str(tmp_path / "losses.sqlite")!r}), device="cpu"))
        texts = [f"{{n}} {{'word ' * 300}}" for n in range(3000)]
        store.losses(texts, [t[:6].encode() for t in texts], lambda _, done, total: print(done, flush=True))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    while (done := int(process.stdout.readline())) < 20:
        time.sleep(0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = LossStore([("model", str(model))], settings_at(tmp_path))
    count = store.file.connection.execute("select count(*) from losses").fetchone()[0]
    assert done <= count < 3000


def test_a_model_that_says_nothing_but_nan_is_named(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = build(tmp_path / "broken")
    llama = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        llama.lm_head.weight.fill_(float("nan"))
    llama.save_pretrained(path)
    store = LossStore([("models.toml: broken", str(path))], settings_at(tmp_path))
    texts = [f"{n} words" for n in range(10)]
    for _ in range(2):  # what is cached is no excuse
        with pytest.raises(UserError, match=r"models.toml: broken = .*broken: its loss is not a number on each of 10 documents"):
            store.losses(texts, [text.encode() for text in texts])


def test_documents_that_have_nothing_to_predict_are_no_sign_of_a_broken_model(tmp_path: Path) -> None:
    store = LossStore([("model", str(build(tmp_path / "model", begin=False)))], settings_at(tmp_path))
    assert np.isnan(store.losses(list("abcdefghij"), [letter.encode() for letter in "abcdefghij"]).nats).all()


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"models.toml: a = .*nowhere \(no folder of this name is here\)"):
        LossModel(str(tmp_path / "nowhere"), settings_at(tmp_path), "models.toml: a").score(["text"])


@pytest.mark.parametrize(
    ("losses", "strength"),
    [
        ([6, 5, 4, 3, 2, 1], 1.0),
        ([6, 5, 4, 3, 1, 2], 14 / 15),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([2, 2], 0.0),
        ([3, 2, 2], 2 / 3),
        ([1, np.nan], np.nan),
    ],
)
def test_predictive_strength_by_its_formula(losses: list[float], strength: float) -> None:
    """The published cases: in order, one neighbouring pair swapped, reversed; a tie counts nothing."""
    np.testing.assert_allclose(predictive_strength(np.array(losses, float)[:, None]), [strength])


def test_pairs_can_weigh_the_distance_of_their_scores() -> None:
    losses = np.array([[3.0, 1.0], [2.0, 3.0], [1.0, 2.0]])
    # Pairs (0,1), (0,2), (1,2) weigh 1, 10, 9; the second document orders the last pair alone.
    np.testing.assert_allclose(predictive_strength(losses, np.array([0.0, 1.0, 10.0])), [1.0, 9 / 20])


def test_what_is_in_order_is_whole_however_the_weights_round() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = np.sort(rng.random(6).round(4))
        assert predictive_strength(np.arange(6.0)[::-1, None], scores)[0] == 1.0


def test_confidence_is_whole_where_strength_is_and_less_where_a_pair_is_wrong() -> None:
    losses = np.array([[5.0, 5.0, 1.0], [4.0, 4.0, 2.0], [3.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    whole, one_wrong, reversed_ = bootstrap_confidence(losses, rounds=400)
    assert whole == 1.0 and 0.1 < one_wrong < 0.9 and reversed_ == 0.0


def test_means_of_groups_leave_out_what_has_no_number() -> None:
    assert group_means(np.array([1.0, np.nan, 0.0, np.nan]), ["a", "a", "a", "b"]) == {"a": 0.5}


@pytest.mark.parametrize(
    ("lines", "letter"),
    [
        ('[[models]]\nname = "a"\npath = "x"\nscores = {t = 1}', "an order needs at least two"),
        ('[[models]]\nname = "a"\npath = "x"\nscores = {t = 1}\n[[models]]\nname = "b"\npath = "x"\nscores = {}', "b has no score of t"),
        (
            '[[models]]\nname = "a"\npath = "x"\nscores = {t = 1}\n[[models]]\nname = "b"\npath = "x"\nscores = {t = 1}',
            "the same score of t",
        ),
        (
            '[[models]]\nname = "a"\npath = "x"\nscores = {t = 1, u = 2}\n[[models]]\nname = "b"\npath = "x"\nscores = {t = 2}',
            "name one with target",
        ),
        (
            '[[models]]\nname = "a"\npath = "x"\nscores = {t = 1}\n[[models]]\nname = "a"\npath = "y"\nscores = {t = 2}',
            "the name a stands twice",
        ),
        ('[[models]]\nname = "a\\nb"\npath = "x"\nscores = {t = nan}\n[[models]]\nname = "b"\npath = "x"\nscores = {t = 1}', "finite"),
    ],
)
def test_a_set_of_models_that_has_no_order_is_refused(tmp_path: Path, lines: str, letter: str) -> None:
    (tmp_path / "models.toml").write_text(lines)
    with pytest.raises(UserError, match=letter):
        load_models(tmp_path / "models.toml", None)


def test_models_stand_from_worst_to_best_even_where_less_is_better(tmp_path: Path) -> None:
    rows = "".join(
        f'[[models]]\nname = "{name}"\npath = "x"\nscores = {{t = {score}}}\n' for name, score in (("a", 1.5), ("b", 2.5), ("c", 2.0))
    )
    (tmp_path / "models.toml").write_text(f"higher_is_better = false\n{rows}")
    models, scores = load_models(tmp_path / "models.toml", None)
    assert [model.name for model in models] == ["b", "c", "a"] and scores.tolist() == [-2.5, -2.0, -1.5]
