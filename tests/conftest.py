"""Shared fixtures: a small corpus, pools of ranks, and where the optional real data is."""

import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regrowth.data_pipeline.config import DataConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.prepare import prepare
from regrowth.parallel.ranks import RankPool
from tests.slurm_cluster import SlurmCluster

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton's kernels are compiled or interpreted as this says when their module is imported, its own library's too, and torch's compiler imports that: so it is said here,
    # before any test's module.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before it could be told to interpret; import it late, or set TRITON_INTERPRET=1"
    )
    os.environ["TRITON_INTERPRET"] = "1"
# A script's background job ignores Ctrl-C, and so would all that it starts; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_WORDS = [
    "growth",
    "ring",
    "model",
    "layer",
    "token",
    "water",
    "stone",
    "river",
    "light",
    "carries",
    "under",
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "with",
    "from",
    "over",
    "slow",
    "new",
    "old",
    "deep",
    "forest",
    "valley",
    "market",
    "engine",
    "signal",
    "number",
    "letter",
    "memory",
    "garden",
    "winter",
    "summer",
    "morning",
    "evening",
    "window",
    "paper",
    "bridge",
]


def prose(seed: int, sentences: int) -> str:
    """Readable nonsense, different for each seed."""
    rng = random.Random(seed)
    made = [" ".join(rng.choices(_WORDS, k=rng.randint(6, 14))).capitalize() + "." for _ in range(sentences)]
    return "\n".join(" ".join(made[i : i + 3]) for i in range(0, len(made), 3))


def program(seed: int, functions: int) -> str:
    """Something like source code."""
    rng = random.Random(seed)
    return "\n\n".join(
        f"def {rng.choice(_WORDS)}_{rng.randint(0, 99)}({rng.choice(_WORDS)}):\n    return {rng.choice(_WORDS)}.{rng.choice(_WORDS)}({rng.randint(0, 999)})"
        for _ in range(functions)
    )


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_documents(folder: Path) -> Path:
    """Two domains of generated documents as jsonl."""
    write_jsonl(folder / "prose.jsonl", [{"text": prose(i, 8 + i % 30), "domain": "prose"} for i in range(160)])
    write_jsonl(folder / "programs.jsonl", [{"text": program(i, 5 + i % 20), "domain": "programs"} for i in range(120)])
    return folder


def small_data_values(documents: Path, out: Path) -> dict:
    """A `[data]` section over them."""
    return {
        "out": str(out),
        "name": "small",
        "heldout_fraction": 0.15,
        "sources": [{"kind": "jsonl", "path": str(documents)}],
        "tokenizer": {"vocabulary": 384, "sample_megabytes": 1.0},
        "shards": {"block_tokens": 4096},
        "workers": 1,
    }


def small_run_values(documents: Path, out: Path, runs: Path, **sections: dict) -> dict:
    """A run config over them; `sections` are laid over it."""
    values = {
        "run": {"name": "small", "folder": str(runs), "steps": 8, "seed": 3, "threads": 1, "device": "cpu"},
        "data": small_data_values(documents, out),
        "loader": {"sequence_length": 64, "global_batch": 8, "unit_sequences": 2},
        "model": {"vocabulary": 384, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_width": 64, "init_std": 0.1},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2, "rewarm_steps": 2},
        "parallel": {"micro_batch": 4},
        "checkpoint": {"every": 4, "keep": 3},
        "evaluation": {"every": 100, "sequences_per_domain": 4, "final_sequences_per_domain": 4},
    }
    for name, section in sections.items():
        below = values.get(name)
        values[name] = {**below, **section} if isinstance(below, dict) and isinstance(section, dict) and name != "mixing" else section
    return values


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated documents in two domains."""
    return small_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def corpus(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The prepared corpus over `documents`."""
    return prepare(DataConfig.model_validate(small_data_values(documents, tmp_path_factory.mktemp("prepared"))))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(2)` is a pool of two gloo processes, kept for the whole session."""
    pools: dict[int, RankPool] = {}
    yield lambda size: pools.setdefault(size, RankPool(size))
    for pool in pools.values():
        pool.close()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """A real Slurm of virtual nodes on this host, where its daemons are installed."""
    if missing := SlurmCluster.missing():
        pytest.skip(missing)
    made = SlurmCluster(Path(f"/tmp/slurm-test-{os.getpid()}"))  # the paths of sockets must be short
    monkeypatch.setenv("SLURM_CONF", str(made.conf))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text, if this machine has it."""
    folder = Path(os.environ.get("REGROWTH_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "corpora").is_dir():
        pytest.skip(f"needs the real-text folder {folder} (set REGROWTH_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A file system of S3, over HTTP, from a local server that speaks it."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    import fsspec

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, value)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would write every request to a stream that may be closed
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield fsspec.filesystem("s3")
        server.stop()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
