"""Tokens per second out of the loader, beside what others read the same tokens with; and what starting, waiting and drawing cost.

Fixed chunks: tokens [T] in stored order, cut every T. Packed: whole batches with labels, positions, document ids and weights, documents in drawn order.
Peers read the same documents: np.memmap slices as Megatron-LM does, its IndexedDataset in random document order, `datasets` rows, and, where they are
installed, Mosaic's streaming and litdata. Every loop sums what it reads, so that nothing is only promised.

    python benchmarks/loader.py --quick
"""

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.feed import Feed
from regrowth.data_pipeline.loader import Loader
from regrowth.data_pipeline.mixing.bandits import OnlineDataMixing
from regrowth.data_pipeline.mixing.config import StaticMixing
from regrowth.data_pipeline.mixing.mixer import Mixer
from regrowth.data_pipeline.packing import count_sequences
from regrowth.data_pipeline.shards import ShardWriter, shard_metadata, shard_schema, shard_summary
from regrowth.data_pipeline.tokenizer import train_tokenizer
from regrowth.files import write_json
from regrowth.pretrain.session import keep_freed_memory

LENGTH = 2048


def made_up_corpus(folder: Path, tokens: int, shards: int = 1) -> Corpus:
    """A corpus of one domain whose documents are as long as web pages are: log-normal, 700 tokens in the mean."""
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(iter(["some text to make a tokenizer of "] * 50), 300, folder / "tokenizer")
    schema = shard_schema(50_000, shard_metadata("web", 50_000, tokenizer.hash))
    target = folder / "train/web"
    target.mkdir(parents=True)
    writer = ShardWriter(target, "00000", schema, 1 << 20, max(tokens // shards, 1 << 10))
    written = 0
    while written < tokens:
        sizes = np.clip(rng.lognormal(6.0, 1.05, 2000), 8, 60_000).astype(np.int64)
        values = rng.integers(0, 50_000, int(sizes.sum()), dtype=np.uint16)
        count = len(sizes)
        columns = [
            pa.LargeListArray.from_arrays(pa.array(np.concatenate(([0], np.cumsum(sizes)))), pa.array(values)),
            pa.array([f"{written}-{i}" for i in range(count)]),
            pa.array(["web"] * count),
            pa.array(np.ones(count, np.int8)),
            pa.array([["made up"]] * count),
            pa.nulls(count, schema.field("scores").type),
            pa.array(np.ones(count, np.float32)),
        ]
        writer.add(pa.RecordBatch.from_arrays(columns, schema=schema), 4 * sizes)
        written += int(sizes.sum())
    rows = [shard_summary(index, f"train/web/{name}") for name, index in writer.close()]
    splits = {"train": {"web": rows}, "heldout": {"web": []}}
    write_json(folder / "corpus.json", {"splits": splits, "tokenizer": {"hash": tokenizer.hash, "vocabulary": 50_000}})
    return Corpus.open(folder)


def ours(corpus: Corpus, packing: str, length: int, prefetch: int = 0) -> Iterator[np.ndarray]:
    """The tokens of batches of 32 sequences, as the trainer gets them."""
    config = LoaderConfig(sequence_length=length, global_batch=32, unit_sequences=32, packing=packing, prefetch=prefetch)  # type: ignore[arg-type]
    loader = Loader(corpus, config, StaticMixing())
    feed = Feed(loader, 0, 1, lambda batch: batch, 1 << 30)
    step = 0
    while True:
        _, batch = feed.take(step)
        loader.observe(step, {0: 1.0})
        step += 1
        yield batch.tokens


def documents(corpus: Corpus) -> Iterator[np.ndarray]:
    """Our documents one by one in random order, out of the mapped shards."""
    blocks = [shard.block(n) for shard in corpus.shards("train", "web") for n in range(len(shard.index.blocks))]
    places = [(tokens, first, last) for tokens, offsets in blocks for first, last in itertools.pairwise((offsets - offsets[0]).tolist())]
    order = np.random.default_rng(0).permutation(len(places))
    while True:
        for i in order:
            tokens, first, last = places[i]
            yield tokens[first:last]


def two_ranks(corpus: Corpus, packing: str, seconds: float) -> float:
    """Tokens a second of two processes together, each of which reads as one rank does."""
    context = multiprocessing.get_context("spawn")
    rates, ready = context.Queue(), context.Barrier(2)
    ranks = [context.Process(target=_rank, args=(corpus.folder, packing, seconds, rates, ready)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    total = sum(rates.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    return total


def _rank(folder: Path, packing: str, seconds: float, rates: Any, ready: Any) -> None:
    keep_freed_memory()
    stream = ours(Corpus.open(folder), packing, LENGTH)
    next(stream)
    ready.wait()
    rates.put(rate(stream, seconds))


def chunks_of_memmap(path: Path, length: int) -> Iterator[np.ndarray]:
    """nanoGPT's and Megatron's way: slices of one flat file, made int32 as a model wants them."""
    values = np.memmap(path, dtype=np.uint16, mode="r")
    while True:
        for begin in range(0, len(values) - 32 * length, 32 * length):
            yield values[begin : begin + 32 * length].astype(np.int32).reshape(32, length)


def nanogpt_batches(path: Path, length: int) -> Iterator[np.ndarray]:
    """nanoGPT's batches: inputs and labels as int64, from random places of one flat file."""
    values, rng = np.memmap(path, dtype=np.uint16, mode="r"), np.random.default_rng(0)
    while True:
        places = rng.integers(0, len(values) - length - 1, 32)
        inputs = np.stack([values[i : i + length].astype(np.int64) for i in places])
        np.stack([values[i + 1 : i + 1 + length].astype(np.int64) for i in places])  # the labels
        yield inputs


def rate(stream: Iterator[np.ndarray], seconds: float) -> float:
    """Tokens a second, after a warm-up of a fifth of the time."""
    until = time.perf_counter() + seconds / 5
    while time.perf_counter() < until:
        next(stream).sum()
    count, began = 0, time.perf_counter()
    while (now := time.perf_counter()) < began + seconds:
        batch = next(stream)
        batch.sum()
        count += batch.size
    return count / (now - began)


def peers(corpus: Corpus, folder: Path) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    """Readers of others over the same tokens, each made when it is called; those that are not installed are left out."""
    blocks = [shard.block(n) for shard in corpus.shards("train", "web") for n in range(len(shard.index.blocks))]
    values = np.concatenate([tokens for tokens, _ in blocks])
    sizes = np.concatenate([np.diff(offsets) for _, offsets in blocks])
    values.tofile(folder / "flat.bin")
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    found: dict[str, Callable[[], Iterator[np.ndarray]]] = {
        "np.memmap, slices in order": lambda: chunks_of_memmap(folder / "flat.bin", LENGTH),
        "np.memmap, nanoGPT's batches": lambda: nanogpt_batches(folder / "flat.bin", LENGTH),
    }

    def indexed() -> Iterator[np.ndarray]:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(str(folder / "indexed"), mmap=True)
        order = np.random.default_rng(0).permutation(len(sizes))
        while True:
            for i in order:
                yield dataset[int(i)]

    def hugging_face() -> Iterator[np.ndarray]:
        import datasets

        paths = [str(shard.path) for shard in corpus.shards("train", "web")]
        dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths]).select_columns(["tokens"])
        dataset = dataset.with_format("numpy")
        order = np.random.default_rng(0).permutation(len(dataset))
        while True:
            for i in order:
                yield dataset[int(i)]["tokens"]

    def mosaic() -> Iterator[np.ndarray]:
        from streaming import MDSWriter, StreamingDataset

        if not (folder / "mds").exists():
            with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:uint16:{LENGTH}"}) as out:
                for begin in range(0, len(values) - LENGTH, LENGTH):
                    out.write({"tokens": values[begin : begin + LENGTH]})
        dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=32)
        while True:
            for row in dataset:
                yield row["tokens"]

    def lightning() -> Iterator[np.ndarray]:
        from litdata import StreamingDataset, TokensLoader
        from litdata.streaming.cache import Cache

        if not (folder / "lit").exists():
            import torch

            cache = Cache(str(folder / "lit"), chunk_bytes="64MB", item_loader=TokensLoader(block_size=LENGTH))
            for i in range(len(sizes)):
                cache[i] = torch.from_numpy(values[offsets[i] : offsets[i + 1]].astype(np.int32))
            cache.done()
            cache.merge()
        dataset = StreamingDataset(str(folder / "lit"), item_loader=TokensLoader(block_size=LENGTH), shuffle=True)
        while True:
            for row in dataset:
                yield row.numpy()

    found |= {"datasets, random documents": hugging_face}
    try:
        import megatron.core.datasets.indexed_dataset  # noqa: F401

        from regrowth.data_pipeline.sources.megatron import write_indexed

        write_indexed(folder / "indexed", iter(blocks), 0, 50_000)
        found["megatron IndexedDataset, random documents"] = indexed
    except ImportError:
        pass
    for name, module, make in (
        ("mosaic streaming, shuffled chunks", "streaming", mosaic),
        ("litdata, shuffled chunks", "litdata", lightning),
    ):
        try:
            __import__(module)
            found[name] = make
        except ImportError:
            pass
    return found


def start_up(folder: Path, shards: int) -> float:
    """Seconds until the first batch of a corpus of many shards (links to one) is there."""
    source = made_up_corpus(folder / "one", 1 << 16)
    row = source.manifest["splits"]["train"]["web"][0]
    many = folder / "many"
    (many / "train/web").mkdir(parents=True)
    (many / "tokenizer").symlink_to(source.folder / "tokenizer")
    rows = []
    for number in range(shards):
        for suffix in (".arrow", ".json"):
            (many / f"train/web/{number:05d}{suffix}").symlink_to((source.folder / row["path"]).with_suffix(suffix))
        rows.append({**row, "path": f"train/web/{number:05d}.arrow"})
    write_json(many / "corpus.json", {**source.manifest, "splits": {"train": {"web": rows}, "heldout": {"web": []}}})
    began = time.perf_counter()
    next(ours(Corpus.open(many), "chunk", LENGTH))
    return time.perf_counter() - began


def own_memory() -> float:
    """MiB of this process that are not pages of files (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def growth_of_memory(corpus: Corpus) -> float:
    """MiB that reading a whole epoch adds to what the first blocks took, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe()
    process = context.Process(target=_read_an_epoch, args=(corpus.folder, there))
    process.start()
    there.close()
    return pipe.recv()


def _read_an_epoch(folder: Path, pipe: Any) -> None:
    corpus = Corpus.open(folder)
    stream, read, before = ours(corpus, "chunk", LENGTH), 0, 0.0
    while read < corpus.tokens("train", "web"):
        if not before and read > 3 << 20:
            before = own_memory()
        read += next(stream).size
    pipe.send(own_memory() - before)


def draw_and_update(domains: int = 22, units: int = 16, steps: int = 2000) -> float:
    """Microseconds of a step's draw and update with ODM: the best of five medians, because whatever else the machine does only adds."""
    return min(_median_of_steps(domains, units, steps) for _ in range(5))


def _median_of_steps(domains: int, units: int, steps: int) -> float:
    policy = OnlineDataMixing(np.full(domains, 1 / domains), "paper", 0.9, 0, "zero")
    mixer = Mixer(policy, [str(i) for i in range(domains)], units, 2, 0)
    spent = []
    for step in range(steps):
        began = time.perf_counter()
        drawn = mixer.draw(step)
        mixer.observe(step, {int(d): 3.0 + 0.01 * int(d) for d in set(drawn.tolist())})
        spent.append(time.perf_counter() - began)
    return 1e6 * float(np.median(spent))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, and without the packages that are slow to import")
    parser.add_argument("--megatokens", type=int, default=200)
    arguments = parser.parse_args()
    seconds, megatokens, shards = (0.7, 12, 500) if arguments.quick else (5.0, arguments.megatokens, 10_000)
    console = Console(width=120)
    keep_freed_memory()  # as in a training process; the peers get it too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = made_up_corpus(folder / "corpus", megatokens << 20, shards=8)
        measured: dict[str, float] = {}
        for packing, what in (("fixed", "ours, fixed chunks"), ("chunk", "ours, packed (chunk)"), ("best_fit", "ours, packed (best_fit)")):
            measured[what] = rate(ours(corpus, packing, LENGTH), seconds)
        for packing in ("fixed", "chunk"):
            measured[f"ours, {packing}, two ranks on the two cores"] = two_ranks(corpus, packing, seconds)
        measured["ours, random documents"] = rate(documents(corpus), seconds)
        measured["ours, packed (chunk), length 512"] = rate(ours(corpus, "chunk", 512), seconds)
        for what, make in peers(corpus, folder).items():
            if not arguments.quick or "np.memmap" in what:
                measured[what] = rate(make(), seconds)
        table = Table("reader", "million tokens/s", "beside np.memmap", title=f"{megatokens}M tokens, sequences of {LENGTH}, one process")
        for what, value in measured.items():
            table.add_row(what, f"{value / 1e6:,.1f}", f"{value / measured['np.memmap, slices in order']:.2f} x as fast")
        console.print(table)
        sizes = [shard.block(n)[1] for shard in corpus.shards("train", "web") for n in range(min(4, len(shard.index.blocks)))]
        costs = Table("what", "measured", "the limit is")
        for length in (512, 2048, 8192):
            used = sum(int(o[-1] - o[0]) for o in sizes)
            places = sum(count_sequences("best_fit", o, length) for o in sizes) * length
            costs.add_row(f"padding of best_fit, length {length}", f"{1 - used / places:.2%}", "")
        costs.add_row(f"first batch of {shards:,} shards", f"{start_up(folder, shards):.2f} s", "2 s")
        if sys.platform == "linux":
            costs.add_row(f"memory that an epoch of {megatokens}M tokens adds", f"{growth_of_memory(corpus):.1f} MiB", "8 MiB")
        costs.add_row("ODM, 22 domains, 16 units: draw and update", f"{draw_and_update():.0f} µs", "50 µs")
        console.print(costs)


if __name__ == "__main__":
    main()
