"""Whether a grown checkpoint computes on real text what its source did."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from regrowth.data_pipeline.batch import Batch
from regrowth.parallel.engine import MicroBatch
from regrowth.pretrain.build import build_model
from regrowth.pretrain.checkpoint import canonical_shapes, read_state
from regrowth.pretrain.loss import to_tensors
from regrowth.pretrain.tensor_files import TensorReader

TOLERANCE = 1e-3  # of the largest logit: fp32's rounding through many layers stays far below it


@dataclass(frozen=True)
class Probe:
    """What was measured; logits in fp32."""

    tokens: int
    largest: float  # of all logits of the source
    deviation: float  # the largest difference of a logit

    @property
    def holds(self) -> bool:
        """Whether the function stayed, but for rounding."""
        return self.deviation <= TOLERANCE * self.largest


def probe(source: Path, grown: Path, batch: Batch) -> Probe:
    """Both models on the same sequences, one at a time; weights are mapped from their files, which the kernel can take back."""
    largest = deviation = 0.0
    for row in range(len(batch)):
        tensors = to_tensors(batch.slice(row, row + 1), torch.device("cpu"))
        before, after = (_logits(path, tensors) for path in (source, grown))
        largest = max(largest, before.abs().max().item())
        difference = (after - before).abs().max().item()
        deviation = max(deviation, difference if math.isfinite(difference) else math.inf)
    return Probe(int((batch.doc_ids >= 0).sum()), largest, deviation)


@torch.no_grad()
def _logits(path: Path, tensors: MicroBatch) -> torch.Tensor:
    config, read = read_state(path).model, TensorReader(path / "model")
    model = build_model(config, torch.device("cpu"), "sdpa")
    model.load_state_dict({name: read(name) for name in canonical_shapes(config)}, assign=True)
    return model.eval()(tensors["tokens"], tensors["positions"], tensors["doc_ids"]).float()
