"""What scoring documents costs: fastText through our runner beside the bare library, and models' losses beside a loop over documents.

fastText: MB of text a second and process. The library alone is given documents as prepared lines in memory and does nothing but predict. The runner has them as `data run` has them, in a segment behind
deduplication (Arrow files of an earlier phase) or straight from JSON lines: it reads, scores, hashes, counts and writes. Then by two processes.
Losses: characters a second of windows in batches of like lengths, beside one document after the other through the same model (and, where a document is longer than the window, one window after the other).

    python benchmarks/selection.py --quick
"""

import argparse
import json
import lzma
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.executors.local import _Team
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.select.classifier import MODEL, one_line, train_classifier
from regrowth.data_pipeline.select.config import FastTextTraining, Losses, SelectorChoice
from regrowth.data_pipeline.select.loss_model import LossModel
from regrowth.data_pipeline.select.record import FORMAT
from regrowth.data_pipeline.select.windows import windows
from regrowth.data_pipeline.transforms.fasttext_score import load_fasttext
from regrowth.files import fingerprint, sha256_of, write_json

DATA = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
_FILES = 8
DOMAINS = ("news_wikinews", "encyclopedia_enwiki", "dialogue_sgd", "sci_abstracts_arxiv")


def texts(megabytes: float) -> list[str]:
    """Real documents of four domains, about so much of them."""
    found: list[str] = []
    for domain in DOMAINS:
        size = 0
        with lzma.open(DATA / "corpora" / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                found.append(json.loads(line)["text"])
                size += len(found[-1])
                if size > megabytes * 1e6 / len(DOMAINS):
                    break
    return found


def classifier(folder: Path, documents: list[str]) -> Path:
    """A fitted selector's folder. What it learns does not matter here."""
    config = SelectorChoice.model_validate({"selectors": {"one": {"kind": "classifier"}}}).selectors["one"]
    folder.mkdir()
    half = len(documents) // 2
    train_classifier(documents[:half:4], documents[half::4], FastTextTraining(epochs=1), folder)
    record = {"format": FORMAT, "version": 1, "config": {}, "settings": config.model_dump(mode="json"), "files": {MODEL: sha256_of(folder / MODEL)},
              "mark": fingerprint("benchmark"), "findings": {}, "cost": {}}  # fmt: skip
    write_json(folder / "selector.json", record)
    return folder


def bare(model: Path, documents: list[str]) -> float:
    """Seconds of the library alone."""
    lines, loaded = [one_line(text) for text in documents], load_fasttext(str(model / MODEL), "model")
    began = time.perf_counter()
    for begin in range(0, len(lines), 1000):
        loaded.predict(lines[begin : begin + 1000], k=-1)
    return time.perf_counter() - began


def _half(model: str, lines: list[str], pipe: Any) -> None:
    loaded = load_fasttext(model, "model")
    loaded.predict(lines[:50], k=-1)
    pipe.send("ready")
    pipe.recv()
    for begin in range(0, len(lines), 1000):
        loaded.predict(lines[begin : begin + 1000], k=-1)
    pipe.send("done")


def bare_twice(model: Path, documents: list[str]) -> float:
    """Seconds of the library alone, half of the documents in each of two processes."""
    lines, context = [one_line(text) for text in documents], multiprocessing.get_context("spawn")
    pipes = []
    for half in range(2):
        mine, theirs = context.Pipe()
        context.Process(target=_half, args=(str(model / MODEL), lines[half::2], theirs), daemon=True).start()
        pipes.append(mine)
    for pipe in pipes:
        pipe.recv()
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send("go")
    for pipe in pipes:
        pipe.recv()
    return time.perf_counter() - began


def runner(model: Path, source: Path, out: Path, workers: int, behind: bool = True) -> float:
    """Seconds of the phase that reads, scores and writes; its processes stand when it begins."""
    shutil.rmtree(out, ignore_errors=True)
    config = DataConfig.model_validate({
        "folder": str(out), "sources": [{"kind": "jsonl", "path": str(source)}], "workers": workers,
        "item_megabytes": 32.0,
        "transforms": [*([{"kind": "exact_dedup"}] if behind else []), {"kind": "selector", "path": str(model)}],
    })  # fmt: skip
    pipeline = Pipeline.plan_of(config).begin()
    number = 2 if behind else 0
    for before in pipeline.phases[:number]:
        for task in range(len(before.task_sizes)):
            before.run_task(task)
        before.settle(0)
    phase = pipeline.phases[number]
    if workers == 1:
        _ = phase.transforms  # loaded, as the library's model is  # pyright: ignore[reportAttributeAccessIssue]
        began = time.perf_counter()
        for task in range(len(phase.task_sizes)):
            phase.run_task(task)
        return time.perf_counter() - began
    team = _Team(out, workers, 1)
    try:
        team.do(number, phase, 0, lambda *_: None)
        records = [phase.record(task) for task in range(len(phase.task_sizes))]
    finally:
        team.close()
    # From the first that every process had behind it, for the model is loaded in it.
    ends = sorted((record["end"], record["bytes"]) for record in records)
    begin = ends[workers - 1][0]
    share = sum(size for end, size in ends if end > begin) / sum(size for _, size in ends)
    return (ends[-1][0] - begin) / share


def naive(model: LossModel, documents: list[str]) -> float:
    """Seconds of one document, and one window, after the other."""
    llama, tokenizer = model._model, model.tokenizer
    began = time.perf_counter()
    with torch.no_grad():
        for text in documents:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
            for w in windows(ids.shape[1], model.window, model.stride):
                logits = llama(ids[:, w.begin : w.stop], use_cache=False).logits.float()[0, w.scored - w.begin - 1 : -1]
                torch.nn.functional.cross_entropy(logits, ids[0, w.scored : w.stop], reduction="sum").item()
    return time.perf_counter() - began


def small_llama(folder: Path, width: int, layers: int) -> Path:
    """A Llama with random weights and a tokenizer trained on the text, as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=4096, show_progress=False
    )
    tokenizer.train_from_iterator(texts(2.0), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = LlamaConfig(vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
                         max_position_embeddings=2048)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="less text")
    options.add_argument("--rounds", type=int)
    options.add_argument("--only", choices=["fasttext", "losses"])
    chosen = options.parse_args()
    if not DATA.exists():
        print(f"skipped: needs the shared data in {DATA}")
        return
    console, rounds = Console(width=120), chosen.rounds or (1 if chosen.quick else 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if chosen.only != "losses":
            documents = texts(8.0 if chosen.quick else 60.0)
            # Several times, each time with another end, so that items are nearly as large as a run's and no document is dropped as a copy.
            several = [f"{text} {copy}" for copy in range(1 if chosen.quick else 4) for text in documents]
            console.print(score_with_fasttext(folder, several, rounds))
        if chosen.only != "fasttext":
            console.print(take_losses(folder, chosen.quick, rounds))


def score_with_fasttext(folder: Path, documents: list[str], rounds: int) -> Table:
    """The first table."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in documents) / 1e6
    model = classifier(folder / "model", documents)
    (folder / "raw").mkdir()
    each = -(-len(documents) // _FILES)
    for number in range(_FILES):  # in the order in which the library has them: whose words the cache still holds is a matter of order
        some = documents[number * each : (number + 1) * each]
        (folder / "raw" / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    measured = {
        "library alone, one process": lambda: bare(model, documents),
        "runner, one process": lambda: runner(model, folder / "raw", folder / "out", 1),
        "runner, one process, from JSON lines": lambda: runner(model, folder / "raw", folder / "out", 1, behind=False),
        "library alone, two processes": lambda: bare_twice(model, documents),
        "runner, two processes": lambda: runner(model, folder / "raw", folder / "out", 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):  # in turns, so that what else the machine does falls on all
        for name, take in measured.items():
            seconds[name].append(take())
    table = Table(
        "",
        "MB/s",
        "to the library alone",
        title=f"fastText over {size:.0f} MB; medians of {rounds} rounds; at least .90 of the library alone is wanted",
    )
    for name, its in seconds.items():
        peer = seconds["library alone, two processes" if "two" in name else "library alone, one process"]
        table.add_row(name, f"{size / np.median(its):.2f}", f"{np.median([p / s for p, s in zip(peer, its, strict=True)]):.2f}")
    return table


def take_losses(folder: Path, quick: bool, rounds: int) -> Table:
    """The second table."""
    table = Table(
        "model",
        "arithmetic",
        "window",
        "characters/s, naive",
        "characters/s, batched",
        "ratio",
        title=f"losses of a model on documents; medians of {rounds} rounds",
    )
    documents = texts(0.05 if quick else 0.3)
    size = sum(map(len, documents))
    for width, layers in ((128, 4),) if quick else ((128, 4), (256, 6)):
        path = small_llama(folder / str(width), width, layers)
        for dtype, window, stride in (("float32", 1900, 512), ("bfloat16", 1900, 512), ("float32", 256, 128), ("bfloat16", 256, 128)):
            model = LossModel(str(path), Losses(window=window, stride=stride, device="cpu", dtype=dtype), "model")  # pyright: ignore[reportArgumentType]
            model.score(documents[:4])
            slow, fast = [], []
            for _ in range(rounds):
                slow.append(naive(model, documents))
                began = time.perf_counter()
                model.score(documents)
                fast.append(time.perf_counter() - began)
            ratio = np.median([s / f for s, f in zip(slow, fast, strict=True)])
            each = (f"{size / np.median(slow):,.0f}", f"{size / np.median(fast):,.0f}", f"{ratio:.2f}")
            table.add_row(f"{width} wide, {layers} layers", dtype, f"{window} by {stride}", *each)
    return table


if __name__ == "__main__":
    main()
