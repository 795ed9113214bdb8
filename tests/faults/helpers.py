"""Runs that faults strike: with everything that a fault can hit, the layers that strike, and the numbers that no fault may change."""

import json
import os
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.corpus import Corpus
from regrowth.files import read_json
from regrowth.pretrain.run_folder import RunFolder
from tests.launch.helpers import write_config


def configured(folder: Path, corpus: Corpus, **sections: Any) -> Path:
    """A run of two ranks with everything that a fault can hit."""
    values: dict[str, Any] = {
        "run": {"steps": 12, "timeout_seconds": 12.0, "deterministic": True},
        "data": None,
        "loader": {"corpus": str(corpus.folder), "sequence_length": 64, "global_batch": 8, "unit_sequences": 2},
        "parallel": {"dp_shard": 2, "micro_batch": 4},
        "checkpoint": {"every": 4, "keep": 8},
        "evaluation": {"every": 5},
        "growth": [{"at_step": 6, "operators": [{"op": "stack"}]}],
        "supervision": {"backoff_seconds": 0.1, "hang_seconds": 5.0},
    }
    return write_config(folder / "c.toml", folder, folder, **{**values, **sections})


def numbers(run: RunFolder) -> dict[str, Any]:
    """All that a fault must not change: losses, the samples of every step, the last weights and moments."""
    manifest = read_json(run.newest_checkpoint / "manifest.json") if run.newest_checkpoint else {}
    return {
        "losses": [(row["step"], row["loss"], row["grad_norm"]) for row in run.rows("metrics")],
        "samples": run.decisions(),
        "evaluations": [row for row in run.rows("evaluations") if row["step"] > 0],
        "weights": {name: row for name, row in manifest["files"].items() if name.startswith(("model/", "optimizer/"))},
    }


def ranks_of(run: RunFolder) -> list[int]:
    """The ranks of a run that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"regrowth.pretrain.worker\0{run.path}\0" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def struck_by(**layers: Any) -> dict[str, str]:
    """The environment of a run under test. `layers`: `fault` and `disk`, as tests/faults/inject takes them."""
    path = os.pathsep.join([str(Path(__file__).parent / "inject"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **{f"REGROWTH_TEST_{name.upper()}": json.dumps(value) for name, value in layers.items()}}
