"""What is reported of a step's losses: sums over tokens, so that means are taken once, over all tokens of a step.

The model gives the sum to differentiate and every token's nll; an engine hands the nlls to one of these, on whatever part of a sequence its rank
holds, and adds the parts up. That is why reports are sums.
"""

from dataclasses import dataclass

import numpy as np
import torch

from regrowth.data_pipeline.batch import Batch
from regrowth.kernels.random import random_bits
from regrowth.parallel.engine import MicroBatch


def to_tensors(batch: Batch, device: torch.device) -> MicroBatch:
    """What the model and the loss need of a batch, on the device; copied from pinned memory to a GPU, without waiting."""
    wanted = ("tokens", "labels", "positions", "doc_ids", "loss_weight")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(batch, name))) for name in wanted}
    # A number for every token that is the same however the step is split; sequences are scattered so that no two have tokens in common.
    scattered_B1 = random_bits(0, torch.from_numpy(np.ascontiguousarray(batch.sample_id)))[:, None]
    tensors["index"] = scattered_B1 + torch.arange(batch.tokens.shape[1])
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def training_report(nll_BT: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """float64 [B, 2] per sequence: the weighted sum of nll in nats (without z-loss), and the sum of weights."""
    weight_BT = batch["loss_weight"]
    return torch.stack(((nll_BT * weight_BT).double().sum(1), weight_BT.double().sum(1)), dim=1)


@dataclass(frozen=True)
class BytesReport:
    """For bits per byte. float64 [B, 3] per sequence: nats of tokens that stand for bytes, their bytes, and their number."""

    bytes_per_token: torch.Tensor  # int [V]

    def __call__(self, nll_BT: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """The sums over the tokens given."""
        bytes_BT = self.bytes_per_token[batch["labels"].long()] * batch["loss_weight"]
        counted_BT = (bytes_BT > 0).double()
        return torch.stack(((nll_BT.double() * counted_BT).sum(1), bytes_BT.double().sum(1), counted_BT.sum(1)), dim=1)
