"""Bits per byte are exact, the trigram is the trigram, and exports speak like the checkpoint."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import UserError
from regrowth.launch.checkpoints import load_model
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.convert import export_hf
from regrowth.pretrain.generate import generate
from regrowth.pretrain.ngram import ByteTrigram, domain_bytes
from regrowth.pretrain.run_folder import RunFolder
from tests.pretrain.helpers import Ranks, go, new_run


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> RunFolder:
    """A short run whose final evaluation reads all held-out text."""
    evaluation = {"every": 100, "final_sequences_per_domain": 100_000}
    return go(new_run(corpus, tmp_path_factory.mktemp("runs"), run={"steps": 12}, evaluation=evaluation), corpus, ranks)


def test_bits_per_byte_equal_a_plain_sum_over_each_document(trained: RunFolder, corpus: Corpus) -> None:
    """Held-out text in sequences of 64: recomputed piece by piece, one piece at a time, without packing or masks."""
    from regrowth.data_pipeline.loader import heldout_batches

    model = load_model(list_checkpoints(trained.path)[-1])
    nats = bytes_ = 0.0
    batch = heldout_batches(corpus, "prose", 64)
    for row in range(len(batch)):
        for document in np.unique(batch.doc_ids[row][batch.loss_weight[row] > 0]):
            chosen = batch.doc_ids[row] == document
            tokens, labels = torch.tensor(batch.tokens[row][chosen])[None], batch.labels[row][chosen]
            with torch.no_grad():
                logits = model(tokens, torch.arange(tokens.shape[1])[None], torch.zeros_like(tokens))[0]
            lost = -torch.log_softmax(logits.double(), -1)
            for position, label in enumerate(labels):
                if label != corpus.tokenizer.end_of_text:
                    nats += lost[position, label].item()
                    bytes_ += len(corpus.tokenizer.pieces[label])
    row = trained.rows("evaluations")[-1]["domains"]["prose"]
    assert bytes_ == row["bytes"] == sum(s["text_bytes"] for s in corpus.manifest["splits"]["heldout"]["prose"])
    assert row["bits_per_byte"] == pytest.approx(nats / bytes_ / math.log(2), rel=1e-5)


def test_the_byte_trigram_agrees_with_a_slow_one(corpus: Corpus) -> None:
    counts: dict[bytes, dict[int, int]] = {}
    for domain in corpus.domains:
        for block in domain_bytes(corpus, "train", domain):
            data = block.tobytes()
            for i in range(len(data) - 2):
                counts.setdefault(data[i : i + 2], {}).setdefault(data[i + 2], 0)
                counts[data[i : i + 2]][data[i + 2]] += 1

    def probability(context: bytes, byte: int) -> float:
        if len(context) == 2:
            table = counts.get(context, {})
        else:
            table = {}
            for longer, successors in counts.items():
                if longer.endswith(context):
                    for b, n in successors.items():
                        table[b] = table.get(b, 0) + n
        lower = probability(context[1:], byte) if context else 1 / 256
        total = sum(table.values())
        return (table.get(byte, 0) + len(table) * lower) / (total + len(table)) if total else lower

    cache: dict[tuple[bytes, int], float] = {}
    trigram = ByteTrigram(corpus)
    data = next(domain_bytes(corpus, "heldout", "programs")).tobytes()[:1500]
    bits = 0.0
    for i in range(len(data) - 2):
        if data[i + 2]:
            key = (data[i : i + 2], data[i + 2])
            cache.setdefault(key, probability(*key))
            bits -= math.log2(cache[key])

    class OnlyThis:
        domains = ("programs",)

    import regrowth.pretrain.ngram as ngram

    real, ngram.domain_bytes = ngram.domain_bytes, lambda *_: iter([np.frombuffer(data, np.uint8)])  # type: ignore[assignment]
    try:
        got, count = trigram.bits(OnlyThis())["programs"]  # type: ignore[arg-type]
    finally:
        ngram.domain_bytes = real
    assert count == sum(1 for b in data[2:] if b) and got == pytest.approx(bits, rel=1e-9)


def test_an_export_gives_the_checkpoints_logits_and_tokens(trained: RunFolder, corpus: Corpus, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = list_checkpoints(trained.path)[-1]
    export_hf(checkpoint, tmp_path / "hf", corpus.tokenizer, 64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Growth ring model layer.\nThe old stone river — déjà vu"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids[0].tolist() == corpus.tokenizer.encode_documents([text])[0][1:]
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        ours = load_model(checkpoint)(ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))
        assert (theirs(ids).logits - ours).abs().max() < 1e-5
    ids = torch.cat((torch.tensor([[corpus.tokenizer.end_of_text]]), ids), dim=1)
    greedy = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    mine = "".join(generate(load_model(checkpoint), corpus.tokenizer, text, 12, 64, temperature=0.0, top_p=1.0, seed=0))
    assert mine == corpus.tokenizer.decode([int(t) for t in greedy if int(t) != corpus.tokenizer.end_of_text]).rstrip("�")


def test_an_export_in_many_files_is_the_same_model(trained: RunFolder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = list_checkpoints(trained.path)[-1]
    export_hf(checkpoint, tmp_path / "one", None, 64)
    export_hf(checkpoint, tmp_path / "many", None, 64, file_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict() for name in ("one", "many")
    )
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    with pytest.raises(UserError, match="exists already"):
        export_hf(checkpoint, tmp_path / "one", None, 64)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "many"}


def test_sampling_is_decided_by_its_seed(trained: RunFolder, corpus: Corpus) -> None:
    model = load_model(list_checkpoints(trained.path)[-1])

    def sample(seed: int) -> str:
        return "".join(generate(model, corpus.tokenizer, "The", 20, 64, temperature=1.0, top_p=0.9, seed=seed))

    assert sample(1) == sample(1) != sample(2)
