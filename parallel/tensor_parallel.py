"""Tensor parallelism on local tensors: every rank of the group holds a slice of each matrix and the model runs on slices as it would on the whole.

Between a pair of split matrices (columns, then rows: Shoeybi et al. 2019) activations are whole; outside, with sequence parallelism (Korthikanti
et al. 2022), each rank keeps its part of the sequence, so that norms and residuals are shared out as well. The vocabulary is split over
embedding and head, and the loss is taken on slices of the logits: no rank ever sees all of them.

Local tensors rather than DTensors in the model: low-precision linears round what a rank holds, and DTensor's dispatch costs a small step
on a CPU more than its arithmetic.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from regrowth.parallel.collectives import Group, copy_in, gather, scatter_sum, sum_out


@dataclass(frozen=True)
class TensorParallel:
    """What a model's split regions need; without a group, all of it is the identity."""

    group: Group = None
    sequence: bool = False  # between regions, activations are split along T

    @property
    def size(self) -> int:
        """Ranks that share a matrix."""
        return self.group.size() if self.group else 1

    @property
    def rank(self) -> int:
        """This one among them."""
        return self.group.rank() if self.group else 0

    def enter(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Into a split region: the whole sequence on every rank."""
        return gather(x_BTD, 1, self.group) if self.sequence else copy_in(x_BTD, self.group)

    def leave(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Out of it: the partial sums of all ranks added up, and this rank's part of the sequence kept."""
        return scatter_sum(x_BTD, 1, self.group) if self.sequence else sum_out(x_BTD, self.group)

    def embed(self, tokens_BT: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding of which each rank holds a range."""
        if self.group is None:
            return functional.embedding(tokens_BT, weight_VD)
        local = tokens_BT - self.rank * weight_VD.shape[0]
        elsewhere = (local < 0) | (local >= weight_VD.shape[0])
        x_BTD = functional.embedding(local.masked_fill(elsewhere, 0), weight_VD).masked_fill(elsewhere[..., None], 0.0)
        return self.leave(x_BTD)


ALONE = TensorParallel()
