"""Curation beside its peers on the same documents, in one run: rule filters, MinHash, tokenise and write, extraction.

Peers come from the package index (`pip install -e '.[bench]'`); one that is missing is skipped by name. Everything is measured on one core except
what says otherwise; rates are documents (or bytes) per second of wall time, and what is compared is their ratio. Agreement of the filters is
part of the measurement: a fast filter that keeps other documents is no filter.

    python benchmarks/curation.py            20,000 documents, about 20 minutes (most of it the peers')
    python benchmarks/curation.py --quick    400 documents
"""

import argparse
import importlib.util
import json
import lzma
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline import transform_config as tc
from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.document import Raw, to_batches
from regrowth.data_pipeline.encoder import build_encoder, choose_engine
from regrowth.data_pipeline.pipeline import Pipeline
from regrowth.data_pipeline.prepare import prepare
from regrowth.data_pipeline.shards import ShardWriter, shard_metadata, shard_schema
from regrowth.data_pipeline.source_config import HtmlSource
from regrowth.data_pipeline.sources.web import HtmlFiles
from regrowth.data_pipeline.text.characters import buffers, folds
from regrowth.data_pipeline.text.shingles import band_keys, hash_functions, shingle_hashes
from regrowth.data_pipeline.tokenizer import train_tokenizer
from regrowth.data_pipeline.transforms import prose

DATA = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_documents(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(file, text) of documents spread evenly over the corpora and the web files."""
    files = [*sorted((DATA / "corpora").glob("*.xz")), DATA / "web/web_noisy_wetlike.jsonl.xz", *sorted((DATA / "web").glob("quality*.xz"))]
    by_file = {}
    for path in files:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            rows = [text for line in lines if len(text := json.loads(line)["text"]) < 100_000]
        random.Random(seed).shuffle(rows)
        by_file[path.name.split(".")[0]] = rows
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count and any(by_file.values()):  # a round-robin, so that small files are used up and large ones fill the rest
        for name, rows in by_file.items():
            chosen += [(name, rows.pop()) for _ in range(min(20, len(rows)))]
    return chosen[:count]


def missing(*packages: str) -> bool:
    """Whether a peer is not installed; says so."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if absent:
        print(f"skipped: {', '.join(absent)} not installed (pip install -e '.[bench]')")
    return bool(absent)


def seconds(action: Callable[[], Any], repeats: int = 1) -> float:
    """Wall time, the best of some repeats."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - begin)
    return best


def compare(what: str, unit: str, ours: float, peer: str, theirs: float) -> None:
    """One line of the result."""
    print(f"{what}: ours {ours:,.0f} {unit}/s, {peer} {theirs:,.0f} {unit}/s: {ours / theirs:.3g} x as fast")


def batch_of(documents: list[tuple[str, str]]) -> pa.RecordBatch:
    """One batch; ids are in order."""
    ((batch, _),) = to_batches([Raw(text, "d", str(i)) for i, (_, text) in enumerate(documents)], bytes_per_batch=1 << 60)
    return batch


def filters(documents: list[tuple[str, str]]) -> None:
    """The four rule sets beside datatrove's, with agreement and every kind of disagreement."""
    if missing("datatrove", "spacy"):
        return
    from datatrove.data import Document
    from datatrove.pipeline import filters as theirs
    from datatrove.utils.text import split_into_parts

    batch = batch_of(documents)
    pairs = [
        ("Gopher quality", theirs.GopherQualityFilter(), prose.GopherQualityFilter(tc.GopherQuality(kind="gopher_quality"))),
        ("Gopher repetition", theirs.GopherRepetitionFilter(), prose.GopherRepetitionFilter(tc.GopherRepetition(kind="gopher_repetition"))),
        ("C4", theirs.C4QualityFilter(), prose.C4Rules(tc.C4(kind="c4"))),
        ("FineWeb", theirs.FineWebQualityFilter(), prose.FineWebFilter(tc.FineWeb(kind="fineweb"))),
    ]
    for name, their, our in pairs:
        our(batch.slice(0, 8))  # compile
        kept, dropped = our(batch)
        time_ours = seconds(lambda our=our: our(batch), 3)
        mine = dict.fromkeys(kept.column("id").to_pylist(), "")
        if dropped is not None:
            mine |= dict(zip(dropped.column("id").to_pylist(), dropped.column("reason").to_pylist(), strict=True))
        verdicts = []
        begin = time.perf_counter()
        for _, text in documents:
            split_into_parts.cache_clear()
            try:
                verdict = their.filter(Document(text=text, id=""))
            except ZeroDivisionError:  # of a text without words
                verdict = (False, "no words")
            verdicts.append("" if verdict is True else str(verdict[1]) if isinstance(verdict, tuple) else "dropped")
        compare(name, "documents", len(documents) / time_ours, "datatrove", len(documents) / (time.perf_counter() - begin))
        differ = Counter(
            (file, their_reason or "keep", mine[identity] or "keep")
            for (file, _), identity, their_reason in zip(documents, batch.column("id").to_pylist(), verdicts, strict=True)
            if bool(their_reason) != bool(mine[identity])
        )
        print(f"  agreement {1 - differ.total() / len(documents):.2%} on {len(documents):,} documents")
        for (file, their_reason, my_reason), count in differ.most_common():
            print(f"    {count:>4}  {file}: datatrove {their_reason}, ours {my_reason}")


def minhash(documents: list[tuple[str, str]], folder: Path, peer_documents: int) -> None:
    """MinHash end to end (read, sign, cluster, drop) on one process beside datatrove's three stages; signatures beside rensa."""
    source = folder / "minhash.jsonl"
    source.write_text("".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, (_, text) in enumerate(documents)), encoding="utf-8")

    def ours() -> None:
        config = DataConfig.model_validate(
            {
                "out": str(folder / f"ours-{random.random()}"),
                "sources": [{"kind": "jsonl", "path": str(source)}],
                "transforms": [{"kind": "minhash_dedup"}],
                "workers": 1,
            }
        )
        pipeline = Pipeline.plan_of(config).begin()
        for phase in pipeline.phases[:3]:
            for task in range(len(phase.task_sizes)):
                phase.run_task(task)
            phase.settle(0)
        for part in pipeline.phases[0].pipeline.parts.present():
            for _ in pipeline.parts.kept(part):
                pass

    ours()  # compile
    time_ours = seconds(ours)
    if not missing("datatrove", "spacy"):
        some = folder / "theirs"
        some.mkdir()
        rows = source.read_text(encoding="utf-8").splitlines(keepends=True)[:peer_documents]
        (some / "some.jsonl").write_text("".join(rows), encoding="utf-8")
        compare(
            "MinHash end to end",
            "documents",
            len(documents) / time_ours,
            "datatrove",
            len(rows) / seconds(lambda: _datatrove_minhash(folder, some)),
        )
    if not missing("rensa"):
        texts = [text for _, text in documents]
        array = pa.array(texts, pa.large_string())
        functions = hash_functions(112, 1)
        time_ours = seconds(lambda: band_keys(*buffers(array), folds(), 5, *functions, 14, 8), 3)
        compare(
            "MinHash signatures",
            "documents",
            len(texts) / time_ours,
            "rensa with Python shingles",
            len(texts) / seconds(lambda: _rensa(texts)),
        )


def _datatrove_minhash(folder: Path, source: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    from loguru import logger

    logger.remove()
    work = folder / f"datatrove-{random.random()}"
    hashing = HashConfig(hash_fc="sha1", precision=64)  # its xxhash wants strings, which xxhash 4 refuses
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=hashing)
    stages = [
        [JsonlReader(str(source)), MinhashDedupSignature(str(work / "signatures"), config=config)],
        [MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=config)],
        [MinhashDedupCluster(str(work / "buckets"), str(work / "removed"), config=config)],
        [JsonlReader(str(source)), MinhashDedupFilter(str(work / "removed")), JsonlWriter(str(work / "kept"), compression=None)],
    ]
    for number, stage in enumerate(stages):
        LocalPipelineExecutor(stage, tasks=14 if number == 1 else 1, workers=1, logging_dir=str(work / f"logs{number}")).run()


def _rensa(texts: list[str]) -> None:
    import rensa

    shingles = []
    for text in texts:
        words = text.lower().split()
        shingles.append([" ".join(words[i : i + 5]) for i in range(len(words) - 4)] or [text])
    rensa.RMinHash.digest_matrix_from_token_sets(shingles, 112, 1)  # pyright: ignore[reportAttributeAccessIssue]


def recall(documents: list[tuple[str, str]], pairs_a_bin: int) -> None:
    """How often pairs of a given Jaccard similarity share a band, beside the formula 1 - (1 - s^8)^14; and the precision of what is flagged."""
    rng = np.random.default_rng(0)
    words = [word for _, text in documents for word in text.split()]
    functions, flagged_low, flagged = hash_functions(112, 1), 0, 0
    print("Jaccard     pairs   measured   formula   difference")
    for low in (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9):
        first, second = [], []
        for _ in range(pairs_a_bin):
            start, length = int(rng.integers(0, len(words) - 400)), 200
            own = words[start : start + length]
            # Of 200 - 4 shingles, an exchanged tail of t words takes t from both: J = (196 - t) / (196 + t).
            target = rng.uniform(low, low + 0.05)
            tail = round(196 * (1 - target) / (1 + target))
            other = int(rng.integers(0, len(words) - 400))
            first.append(" ".join(own))
            second.append(" ".join(own[: length - tail] + words[other : other + tail]))
        sides = [pa.array(side, pa.large_string()) for side in (first, second)]
        keys = [band_keys(*buffers(side), folds(), 5, *functions, 14, 8) for side in sides]
        hit = (keys[0] == keys[1]).any(axis=0)
        sets = [shingle_hashes(*buffers(side), folds(), 5) for side in sides]
        similarity = np.array([
            _jaccard(sets[0][0][a:b], sets[1][0][c:d])
            for a, b, c, d in zip(sets[0][1], sets[0][1][1:], sets[1][1], sets[1][1][1:], strict=False)
        ])  # fmt: skip
        expected = 1 - (1 - similarity**8) ** 14
        print(
            f"{similarity.mean():.3f}  {len(hit):>8,}   {hit.mean():.4f}     {expected.mean():.4f}    {hit.mean() - expected.mean():+.4f}"
        )
        flagged += int(hit.sum())
        flagged_low += int((hit & (similarity < 0.5)).sum())
    print(f"  of the flagged pairs {1 - flagged_low / max(flagged, 1):.2%} have a Jaccard similarity of at least .5")


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.unique(a), np.unique(b)
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


def tokenise(documents: list[tuple[str, str]], folder: Path) -> None:
    """Encode and write shards on one core beside Hugging Face `tokenizers`, which only encodes."""
    texts = [text for _, text in documents]
    size = sum(len(text.encode()) for text in texts)
    tokenizer = train_tokenizer(iter(texts[:4000]), 8192, folder / "tokenizer")
    name, reason = choose_engine(tokenizer, texts[:500], "auto")
    print(f"  engine: {name} ({reason})")
    encoder = build_encoder(tokenizer, name)
    schema = shard_schema(tokenizer.size, shard_metadata("d", tokenizer.size, tokenizer.hash))

    def ours() -> None:
        writer = ShardWriter(folder / f"shards-{random.random()}", "00000", schema, 1 << 20, 1 << 27)
        for begin in range(0, len(texts), 1000):
            some = texts[begin : begin + 1000]
            ids, offsets = encoder.encode(some)
            columns = [
                pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids.astype(np.uint16))),
                pa.array([str(begin + i) for i in range(len(some))]),
                pa.array(["d"] * len(some)),
                pa.array(np.ones(len(some), dtype=np.int8)),
                pa.array([["source"]] * len(some)),
                pa.nulls(len(some), schema.field("scores").type),
                pa.array(np.ones(len(some), dtype=np.float32)),
            ]
            writer.add(pa.RecordBatch.from_arrays(columns, schema=schema), np.array([len(text.encode()) for text in some]))
        writer.close()

    def theirs() -> None:
        for begin in range(0, len(texts), 1000):
            tokenizer.backend.encode_batch_fast(texts[begin : begin + 1000], add_special_tokens=False)

    ours()
    compare("tokenise and write", "MB", size / 1e6 / seconds(ours, 2), "tokenizers (encode only)", size / 1e6 / seconds(theirs))
    ids, offsets = encoder.encode(texts)
    expected, borders = tokenizer.encode_flat(texts)
    print(f"  ids identical on all {len(texts):,} documents: {np.array_equal(ids, expected) and np.array_equal(offsets, borders)}")


def extraction(folder: Path, repeats: int) -> None:
    """HTML files to documents beside a bare loop over resiliparse."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    pages = folder / "pages"
    pages.mkdir()
    with lzma.open(DATA / "web/html_labelled.jsonl.xz", "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            (pages / f"{number:04d}.html").write_text(json.loads(line)["html"], encoding="utf-8")
    paths = sorted(pages.iterdir())
    source = HtmlFiles(HtmlSource(kind="html", path=str(pages)))

    def ours() -> None:
        for item in source.items(64_000_000):
            for _ in to_batches(source.read(item)):
                pass

    def bare() -> None:
        for path in paths:
            data = path.read_bytes()
            extract_plain_text(bytes_to_str(data, detect_encoding(data) or "utf-8"), main_content=True, alt_texts=False)

    ours()
    time_ours, time_bare = seconds(ours, repeats), seconds(bare, repeats)
    compare("extraction", "pages", len(paths) / time_ours, "bare resiliparse", len(paths) / time_bare)


def whole_recipe(folder: Path, documents: list[tuple[str, str]]) -> None:
    """All of it on two processes, for the record."""
    source = folder / "whole.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in documents), encoding="utf-8")
    kinds = ("normalise", "gopher_repetition", "gopher_quality", "fineweb", "exact_dedup", "minhash_dedup")
    values = {
        "out": str(folder / "whole"),
        "sources": [{"kind": "jsonl", "path": str(source)}],
        "transforms": [{"kind": kind} for kind in kinds],
        "item_megabytes": 8,
        "workers": 2,
    }
    time_taken = seconds(lambda: prepare(DataConfig.model_validate(values)))
    print(
        f"filters, dedup, tokenizer, shards on two processes: {source.stat().st_size / 1e6 / time_taken:.1f} MB/s, {len(documents) / time_taken:,.0f} documents/s"
    )


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["filters", "minhash", "recall", "tokenise", "extraction", "whole"])
    arguments = parser.parse_args()
    if not (DATA / "corpora").is_dir():
        print(f"skipped: needs the real-text folder {DATA} (set REGROWTH_SHARED_DATA)")
        sys.exit(0)
    documents = real_documents(400 if arguments.quick else 20_000)
    print(f"{len(documents):,} documents, {sum(len(t) for _, t in documents) / 1e6:.1f} M characters")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], None]] = {
            "filters": lambda: filters(documents),
            "minhash": lambda: minhash(documents, folder, 200 if arguments.quick else 2000),
            "recall": lambda: recall(documents, 400 if arguments.quick else 20_000),
            "tokenise": lambda: tokenise(documents, folder),
            "extraction": lambda: extraction(folder, 1 if arguments.quick else 5),
            "whole": lambda: whole_recipe(folder, documents),
        }
        for part, action in parts.items():
            if arguments.only in (None, part):
                action()


if __name__ == "__main__":
    main()
