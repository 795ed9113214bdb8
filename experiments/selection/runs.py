"""Which selector's subset teaches a target best: models of about 1M parameters and 2M tokens, five paired seeds, on a pool of real text that is mostly not what is wanted.

The pool holds news, an encyclopedia, law, mathematics, dialogue, abstracts, documentation, 388 languages, and web pages that are little but navigation and advertisement; the target is the
encyclopedia (or, with --target, another domain), of which two articles in five are kept from the pool: their training part is what selectors may see, their held-out part is what models are measured on.
Everything is made by `regrowth data select compare`; this program writes the texts and the recipe. It goes on where it was stopped; `--table` shows what there is.

    python experiments/selection/runs.py --out selection_runs
    python experiments/selection/runs.py --out selection_runs --table
"""

import argparse
import json
import lzma
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import DATA

from regrowth.files import read_json, write_json, write_text
from regrowth.launch.judge import Outcome, compare
from regrowth.launch.judge_page import plot

# Megabytes of text of each domain in the pool.
POOL = {
    "corpora/encyclopedia_enwiki": 3.0, "corpora/news_wikinews": 3.0, "corpora/legal_dc_code": 3.0, "corpora/math_latex_stacks": 3.0, "corpora/dialogue_sgd": 3.0,
    "corpora/sci_abstracts_arxiv": 3.0, "corpora/tech_docs_peps": 3.0, "corpora/multilingual_udhr": 2.0, "web/web_noisy_wetlike": 6.0,
}  # fmt: skip
_PIECE = 4000  # characters of a document in the pool, so that no few long ones are a subset

STEPS, TOKENS, LENGTH = 250, 8192, 256
MODEL = {"vocabulary": 2048, "width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32, "ffn_width": 384}
CHOICES = ("arc_easy", "piqa", "hellaswag_val", "blimp")


def documents(name: str, megabytes: float) -> Iterator[tuple[int, str]]:
    """(article, piece of it) of a domain, cut at paragraphs, so much of them."""
    left = megabytes * 1e6
    with lzma.open(DATA / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for article, line in enumerate(lines):
            piece = ""
            for paragraph in json.loads(line)["text"].split("\n"):
                if len(piece) + len(paragraph) > _PIECE and piece.strip():
                    yield article, piece
                    left -= len(piece.encode("utf-8", "surrogatepass"))
                    piece = ""
                piece += paragraph[: 4 * _PIECE] + "\n"
                if left <= 0:
                    return
            if piece.strip():
                yield article, piece
                left -= len(piece.encode("utf-8", "surrogatepass"))


def write_texts(out: Path, target: str) -> None:
    """The pool, and the target's own fifth of its domain."""
    if (out / "texts" / "done").exists():
        return
    mine: list[str] = []
    for name, megabytes in POOL.items():
        rows = []
        for article, text in documents(name, megabytes * (1.6 if name.endswith(target) else 1.0)):
            if name.endswith(target) and xxhash.xxh3_64_intdigest(str(article).encode(), 5) % 5 < 2:
                mine.append(text)
            else:
                rows.append({"text": text, "url": f"http://{name.split('/')[1]}.{len(rows) % 40}.org/{len(rows)}"})
        write_text(out / "texts" / "pool" / f"{name.split('/')[1]}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / "texts" / "target" / f"{target}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in mine))
    write_text(out / "texts" / "done", "")


def recipe(out: Path, target: str, seeds: int, at_once: int) -> dict[str, Any]:
    """The selection, as a recipe file has it."""
    losses = {"cache": str(out / "losses.sqlite"), "device": "cpu", "window": 256, "stride": 128}
    labelled = out / "texts" / "quality.jsonl"
    with lzma.open(DATA / "web" / "quality_labels_dclm_majority.jsonl.xz", "rt", encoding="utf-8") as lines:
        write_text(labelled, "".join(json.dumps({"text": row["text"], "score": row["label"]}) + "\n" for row in map(json.loads, lines)))
    common = {"heldout_fraction": 0.02, "workers": at_once, "shards": {"block_tokens": 65536}}
    return {
        "out": str(out),
        "data": {**common, "out": str(out / "prepared"), "name": "pool", "sources": [{"kind": "jsonl", "path": str(out / "texts" / "pool")}],
                 "tokenizer": {"vocabulary": 2048, "sample_megabytes": 8.0}},
        "target": {**common, "out": str(out / "prepared"), "name": "target", "heldout_fraction": 0.4,
                   "sources": [{"kind": "jsonl", "path": str(out / "texts" / "target")}]},
        "selectors": {
            "random": {"kind": "random"},
            "length_matched": {"kind": "length_matched", "like": "dclm", "fraction": 0.2},
            "perplexity": {"kind": "perplexity", "model": "family/model-250", "losses": losses},
            "bertin": {"kind": "perplexity", "model": "family/model-250", "prefer": "gaussian", "losses": losses},
            "miniplm": {"kind": "difference", "teacher": "family/model-250", "reference": "family/model-25", "losses": losses},
            "dclm": {"kind": "classifier"},
            "fineweb_edu": {"kind": "regression", "model": "family/model-250", "labelled": str(labelled), "device": "cpu"},
            "dsir": {"kind": "importance"},
            "preselect": {"kind": "preselect", "models_file": "family", "per": "domain", "documents": 300, "losses": losses},
        },
        "training": {
            "run": {"steps": STEPS, "threads": 1, "device": "cpu"},
            "loader": {"sequence_length": LENGTH, "global_batch": TOKENS // LENGTH, "unit_sequences": 2},
            "model": MODEL,
            "optimizer": {"lr": 2e-3},
            "parallel": {"micro_batch": 16},
            "checkpoint": {"every": 250, "keep": 1},
            "evaluation": {"every": 250, "final_sequences_per_domain": 8},
        },
        "family": {"steps": [25, 50, 100, 150, 200, 250]},
        "compare": {"fraction": 0.2, "seeds": seeds, "at_once": at_once, "choices": [str(DATA / "evals" / f"{name}.jsonl.xz") for name in CHOICES]},
    }  # fmt: skip


def main() -> None:
    """Write texts and recipe, compare, keep what came of it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("selection_runs"))
    options.add_argument("--results", type=Path, default=Path(__file__).parents[2] / "docs/results/selection.json")
    options.add_argument("--target", default="encyclopedia_enwiki", choices=[name.split("/")[1] for name in POOL])
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--only", default="", help="selectors, as NAME,NAME")
    options.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    options.add_argument("--table", action="store_true")
    chosen = options.parse_args()
    if not DATA.exists():
        print(f"skipped: needs the shared data in {DATA}")
        return
    out = chosen.out.resolve()
    write_texts(out, chosen.target)
    write_text(out / "recipe.toml", tomli_w.dumps(recipe(out, chosen.target, chosen.seeds, chosen.at_once)))
    compare(str(out / "recipe.toml"), [], chosen.only, chosen.table)
    outcomes = read_json(out / "comparison.json")
    write_json(chosen.results, outcomes)
    if drawing := plot([Outcome(**row) for row in outcomes], "random", "bits_per_byte"):
        write_text(chosen.results.with_suffix(".svg"), drawing)


if __name__ == "__main__":
    main()
