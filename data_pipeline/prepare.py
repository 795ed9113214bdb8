"""From config to corpus: curate, train the tokenizer, encode, split, shard. Every step that is done is passed over on a rerun."""

import collections
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from regrowth.data_pipeline.arrow import pc
from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import SPLITS, Corpus
from regrowth.data_pipeline.curate import CuratedParts, Funnel, curate_item, list_items, part_path
from regrowth.data_pipeline.shards import ShardIndex, ShardWriter, shard_summary
from regrowth.data_pipeline.sources.base import Item
from regrowth.data_pipeline.tokenizer import Tokenizer, train_tokenizer
from regrowth.data_pipeline.transforms.hashing import heldout_mask
from regrowth.errors import RunFailed, UserError
from regrowth.files import exclusive, fingerprint, write_json

# What the caller shows of the progress: (what is being done, how much is done, of how much).
Progress = Callable[[str, float, float], None]


def corpus_folder(config: DataConfig) -> Path:
    """Where this config's corpus is or will be."""
    return config.out / f"{config.name}-{_fingerprint(config, list_items(config))}"


def _fingerprint(config: DataConfig, items: list[tuple[int, Item]]) -> str:
    # Where it is written, and by how many workers, does not change what is written.
    settings = config.model_dump(mode="json", exclude={"out", "name", "workers"})
    tokenizer = Tokenizer.load(config.tokenizer.path).hash if config.tokenizer.path else ""
    return fingerprint([settings, [[number, item.describe()] for number, item in items], tokenizer], length=8)


def prepare(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """Build the corpus of `config`, or open it if it is finished.

    Raises:
        UserError: a source is missing or empty, or every document was dropped (with the reasons counted).
        RunFailed: a worker process died, or the disk is full; run it again to go on.
    """
    report: Progress = progress or (lambda *_: None)
    items = list_items(config)
    folder = config.out / f"{config.name}-{_fingerprint(config, items)}"
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".lock"):  # whoever comes second waits, and then finds it finished
        return _prepare(config, items, folder, report)


def _prepare(config: DataConfig, items: list[tuple[int, Item]], folder: Path, report: Progress) -> Corpus:
    if (folder / "corpus.json").exists():
        corpus = Corpus.open(folder)
        if not corpus.missing():
            return corpus
        (folder / "corpus.json").unlink()  # shards were removed, as the letter about a damaged one says: they are written again
    _curate(config, items, folder, report)
    parts = CuratedParts(config, folder, len(items))
    funnel = parts.funnel()
    _refuse_nothing_left(config, funnel)
    parts.write_duplicates(funnel)
    tokenizer = _tokenizer(config, parts, folder, report)
    splits = _shard(config, parts, tokenizer, folder, report, funnel)
    _refuse_empty_split(splits, config)
    manifest = {
        "format": 1,
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "tokenizer": {"hash": tokenizer.hash, "vocabulary": tokenizer.size},
        "splits": {
            split: {d: [shard_summary(i, _shard_name(split, d, n)) for n, i in enumerate(indexes)] for d, indexes in by_domain.items()}
            for split, by_domain in splits.items()
        },
        "funnel": [[*key, *value] for key, value in sorted(funnel.items())],
    }
    write_json(folder / "corpus.json", manifest)
    return Corpus.open(folder)


def _curate(config: DataConfig, items: list[tuple[int, Item]], folder: Path, report: Progress) -> None:
    todo = [n for n in range(len(items)) if not part_path(folder, n).with_suffix(".json").exists()]
    done = len(items) - len(todo)
    report("curate", done, len(items))
    if config.workers == 1 or len(todo) <= 1:
        for number in todo:
            curate_item(config, items[number], folder, number)
            report("curate", done := done + 1, len(items))
        return
    pool = ProcessPoolExecutor(min(config.workers, len(todo)), mp_context=get_context("spawn"))
    try:
        with _ignoring_interrupts():  # Ctrl-C is this process's business; its workers finish their part
            futures = [pool.submit(curate_item, config, items[n], folder, n) for n in todo]
        for future in as_completed(futures):
            future.result()
            report("curate", done := done + 1, len(items))
    except BrokenProcessPool as error:
        raise RunFailed(
            f"{folder}: a curation worker was killed (out of memory?). {done} of {len(items)} parts are kept; "
            "run the same command again to go on, with data.workers=1 if memory is short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started inside inherit that SIGINT is ignored."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, where no signal arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _refuse_nothing_left(config: DataConfig, funnel: Funnel) -> None:
    last = _last_map_name(config)
    if any(documents for (_, transform, reason), (documents, _) in funnel.items() if transform == last and not reason):
        return
    reasons: collections.Counter[str] = collections.Counter()
    for (_, transform, reason), (documents, _) in funnel.items():
        if reason:
            reasons[f"{transform}: {reason}"] += documents
    if not reasons:
        raise UserError("data.sources: no document was found in any source. Check their paths and suffixes.")
    told = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())
    raise UserError(
        f"data.transforms: every document was dropped: {told}. Loosen the transform's limits, or check that the sources hold text."
    )


def _last_map_name(config: DataConfig) -> str:
    """The name under which the funnel counts what left the last batch-wise transform."""
    names = [t.kind for t in config.transforms if t.kind != "exact_dedup"]
    return names[-1] if names else "source"


def _tokenizer(config: DataConfig, parts: CuratedParts, folder: Path, report: Progress) -> Tokenizer:
    out = folder / "tokenizer"
    if config.tokenizer.path:
        given = Tokenizer.load(config.tokenizer.path)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given.path, out / "tokenizer.json")
        return Tokenizer.load(out)
    if not (out / "tokenizer.json").exists():
        report("train tokenizer", 0, 1)
        train_tokenizer(_sample(config, parts), config.tokenizer.vocabulary, out)
        report("train tokenizer", 1, 1)
    return Tokenizer.load(out)


def _sample(config: DataConfig, parts: CuratedParts) -> Iterator[str]:
    """Training documents spread evenly over the corpus, held-out ones left out, `sample_megabytes` of them."""
    total = sum(pc.sum(pc.binary_length(batch.column("text"))).as_py() for batch in parts.documents())
    share = min(1.0, config.tokenizer.sample_megabytes * 1e6 / max(total, 1))
    taken = seen = 0
    for batch in parts.documents():
        train = batch.filter(pa.array(~_heldout(config, batch)))
        for text in train.column("text").to_pylist():
            seen += len(text)
            if taken <= share * seen:
                taken += len(text)
                yield text


def _heldout(config: DataConfig, batch: pa.RecordBatch) -> np.ndarray:
    column = batch.column("content_hash")
    buffer = column.buffers()[1]
    hashes = np.frombuffer(buffer, "V16", count=len(batch), offset=16 * column.offset) if len(batch) else np.zeros(0, "V16")
    return heldout_mask(hashes, config.heldout_fraction)


def _shard(
    config: DataConfig, parts: CuratedParts, tokenizer: Tokenizer, folder: Path, report: Progress, funnel: Funnel
) -> dict[str, dict[str, list[ShardIndex]]]:
    """Encode all documents into shards by split and domain. Redone as a whole if it was interrupted: it takes one pass."""
    writers: dict[tuple[str, str], ShardWriter] = {}
    done = 0
    for split in SPLITS:
        shutil.rmtree(folder / split, ignore_errors=True)
    total = sum(len(batch) for batch in parts.documents())
    for batch in parts.documents():
        texts = batch.column("text").to_pylist()
        encoded = tokenizer.encode_documents(texts)
        lengths = pc.binary_length(batch.column("text")).to_pylist()
        rows = zip(
            encoded,
            batch.column("id").to_pylist(),
            batch.column("domain").to_pylist(),
            batch.column("source").to_pylist(),
            batch.column("lineage").to_pylist(),
            lengths,
            _heldout(config, batch),
            strict=True,
        )
        for tokens, document, domain, source, lineage, text_bytes, held in rows:
            split = "heldout" if held else "train"
            if (split, domain) not in writers:
                out = folder / split / domain_folder(domain)
                sizes = (config.shards.block_tokens, config.shards.shard_tokens)
                writers[split, domain] = ShardWriter(out, domain, tokenizer.size, tokenizer.hash, *sizes)
            writers[split, domain].add(tokens, document, [source, *lineage], text_bytes)
            documents, bytes_ = funnel[(domain, f"split_{split}", "")]
            funnel[(domain, f"split_{split}", "")] = (documents + 1, bytes_ + text_bytes)
        done += len(batch)
        report("tokenise and shard", done, total)
    splits: dict[str, dict[str, list[ShardIndex]]] = {split: {} for split in SPLITS}
    for (split, domain), writer in sorted(writers.items()):
        splits[split][domain] = writer.close()
    return splits


def _refuse_empty_split(splits: dict[str, dict[str, list[ShardIndex]]], config: DataConfig) -> None:
    for split, remedy in (("train", "Add documents."), ("heldout", "Add documents or raise data.heldout_fraction.")):
        if not splits[split]:
            raise UserError(
                f"data.heldout_fraction = {config.heldout_fraction}: the {split} split got no document; the corpus is too small. {remedy}"
            )


def domain_folder(domain: str) -> str:
    """A domain's name as a folder name: what is not plain is escaped, so that two domains never share one."""
    return "".join(c if c.isalnum() or (c in "-_." and domain[0] != ".") else f"%{ord(c):02x}" for c in domain) or "%empty"


def _shard_name(split: str, domain: str, number: int) -> str:
    return f"{split}/{domain_folder(domain)}/{number:05d}.arrow"
