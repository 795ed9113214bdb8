"""How much memory the processes of a curation take, on a corpus of any size made from real text.

Documents are real ones with a share of their sentences exchanged, so that they are many, different, and partly near-duplicates. The run is a
process of its own; what is reported is the largest resident size that any process of it reached (`ru_maxrss` of its descendants).

    python benchmarks/curation_memory.py --gigabytes 5
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RECIPE = """
[data]
out = "{out}"
name = "memory"
workers = 2
[[data.sources]]
kind = "jsonl"
path = "{source}"
{transforms}
[data.tokenizer]
vocabulary = 8192
"""
KINDS = ("normalise", "gopher_repetition", "gopher_quality", "fineweb", "exact_dedup", "minhash_dedup")
LIMIT_GIGABYTES = 2.0


def shared_texts() -> list[str]:
    """Prose of the shared data; a clear end without it."""
    import lzma

    folder = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "corpora"
    if not folder.is_dir():
        print(f"skipped: needs the real-text folder {folder} (set REGROWTH_SHARED_DATA)")
        sys.exit(0)
    texts = []
    for name in ("news_wikinews", "encyclopedia_enwiki", "speeches_us_presidents", "web_blog_digitalgov"):
        with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"][:20_000] for line in lines]
    return texts


def documents(texts: list[str], size: float) -> Iterator[str]:
    """Real documents with a fifth of their sentences taken from others, until `size` bytes; one in ten is a near-copy of the one before."""
    rng = random.Random(0)
    sentences = [s for text in texts[:4000] for s in text.split(". ") if 40 < len(s) < 400]
    written, before = 0, ""
    while written < size:
        if before and rng.random() < 0.1:
            text = before + " " + rng.choice(sentences) + "."
        else:
            own = rng.choice(texts).split(". ")
            text = ". ".join(rng.choice(sentences) if rng.random() < 0.2 else s for s in own)
        written += len(text.encode()) + 12
        before = text
        yield text


def main() -> None:
    """Make the corpus, run the pipeline on it, print the largest resident size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--quick", action="store_true", help="30 MB")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed)")
    arguments = parser.parse_args()
    size = 30e6 if arguments.quick else arguments.gigabytes * 1e9
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="curation-memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        texts = shared_texts()
        with (folder / "big.jsonl").open("w", encoding="utf-8") as out:  # one file: it has to be split
            for text in documents(texts, size):
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        del texts
        transforms = "\n".join(f'[[data.transforms]]\nkind = "{kind}"' for kind in KINDS)
        (folder / "recipe.toml").write_text(RECIPE.format(out=folder / "out", source=folder / "big.jsonl", transforms=transforms))
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "regrowth", "data", "run", str(folder / "recipe.toml")], capture_output=True, text=True
        )
        seconds = time.monotonic() - begin
        if done.returncode:
            sys.exit(done.stderr)
        gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(done.stdout[-3000:])
        print(f"{size / 1e9:.2f} GB of documents, 2 workers: {seconds:.0f} s, {size / 1e6 / seconds:.1f} MB/s")
        print(f"largest process: {gigabytes:.2f} GiB resident; the limit is {LIMIT_GIGABYTES:g} GiB")
        sys.exit(gigabytes > LIMIT_GIGABYTES)
    finally:
        if not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
