"""The training loss and what is reported of it: sums over tokens, so that means are taken once, over all tokens of a step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from regrowth.data_pipeline.batch import Batch

MicroBatch = dict[str, torch.Tensor]


def to_tensors(batch: Batch, device: torch.device) -> MicroBatch:
    """What the model and the loss need of a batch, on the device."""
    wanted = ("tokens", "labels", "positions", "doc_ids", "loss_weight")
    return {name: torch.from_numpy(np.ascontiguousarray(getattr(batch, name))).to(device, non_blocking=True) for name in wanted}


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats of every token, fp32 [B, T]."""
    flat = functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten().long(), reduction="none")
    return flat.view(labels_BT.shape)


@dataclass(frozen=True)
class LanguageModelLoss:
    """Sum over tokens of loss_weight * (nll + z_loss * log(Z)^2); z-loss as in PaLM (arXiv 2204.02311, section 5).

    Reports float64 [B, 2] per sequence: the weighted sum of nll (without z-loss) and the sum of weights.
    """

    z_loss: float = 0.0

    def __call__(self, model: Callable[..., torch.Tensor], batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum to differentiate, and the report."""
        logits_BTV = model(batch["tokens"], batch["positions"], batch["doc_ids"])
        nll_BT = token_losses(logits_BTV, batch["labels"])
        weight_BT = batch["loss_weight"]
        total = (nll_BT * weight_BT).sum()
        if self.z_loss:
            total = total + self.z_loss * (torch.logsumexp(logits_BTV.float(), dim=-1).square() * weight_BT).sum()
        report = torch.stack(((nll_BT.detach() * weight_BT).double().sum(1), weight_BT.double().sum(1)), dim=1)
        return total, report


@dataclass(frozen=True)
class BitsPerByteLoss:
    """For evaluation. Reports float64 [B, 3] per sequence: nats of tokens that stand for bytes, their bytes, and their number."""

    bytes_per_token: torch.Tensor  # int [V]

    def __call__(self, model: Callable[..., torch.Tensor], batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the sum of nats, the report)."""
        nll_BT = token_losses(model(batch["tokens"], batch["positions"], batch["doc_ids"]), batch["labels"])
        bytes_BT = self.bytes_per_token[batch["labels"].long()] * batch["loss_weight"]
        counted_BT = (bytes_BT > 0).double()
        report = torch.stack(((nll_BT.double() * counted_BT).sum(1), bytes_BT.double().sum(1), counted_BT.sum(1)), dim=1)
        return nll_BT.sum(), report
