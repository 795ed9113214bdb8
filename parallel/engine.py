"""The engine edge: what a training loop needs of whatever runs the model.

An engine is handed micro-batches and speaks canonical names at its edge: `weights` and `moments` are dicts from canonical name to tensor (plain or
DTensor), read and written in place. It knows nothing of data or of loss curves: the model gives the sum to differentiate and each token's nll,
and `report` says what is wanted of those.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from regrowth.parallel.layout import ParameterSplit
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.model_parallel import ModelParallel
from regrowth.parallel.pipeline import Costs
from regrowth.parallel.plan import ParallelPlan

MicroBatch = dict[str, torch.Tensor]
# (nll [b, t], micro-batch) -> sums over tokens [b, n] of whatever part of the sequences is given
Report = Callable[[torch.Tensor, MicroBatch], torch.Tensor]
INPUTS = ("positions", "doc_ids", "labels", "loss_weight", "index")  # what a model takes besides tokens, in order


class Engine(Protocol):
    """What the loop talks to.

    `forward_backward` accumulates d(scale * sum of all ranks' totals); `step` clips, updates, clears and returns the norm before clipping (not
    finite or above the limit: no update was made); `gather` concatenates over data ranks; `loaded` is called after weights and moments were written into.
    """

    @property
    def plan(self) -> ParallelPlan: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def data_rank(self) -> int: ...
    @property
    def data_ranks(self) -> int: ...
    @property
    def forward_rows(self) -> int: ...
    @property
    def modules(self) -> Sequence[nn.Module]: ...

    def forward_backward(self, micro_batches: Sequence[MicroBatch], report: Report, scale: float) -> list[torch.Tensor]: ...

    def forward(self, micro_batch: MicroBatch, report: Report) -> torch.Tensor: ...

    def step(self, lr: float, clip: float, limit: float = ...) -> float: ...

    def gather(self, values: torch.Tensor) -> torch.Tensor: ...

    def weights(self) -> dict[str, torch.Tensor]: ...

    def moments(self) -> dict[str, torch.Tensor]: ...

    def moment_bytes(self) -> int: ...

    @property
    def optimizer_steps(self) -> int: ...

    def loaded(self, optimizer_steps: int) -> None: ...


class Splittable(Protocol):
    """What a model declares about itself; its `forward(x, positions, doc_ids, labels, loss_weight)` gives (total [1], nll [b, t]) on the last
    stage and hidden states elsewhere."""

    def use(self, parallel: ModelParallel, attend: Any) -> None: ...
    def blocks(self) -> list[nn.Module]: ...
    def expert_modules(self) -> list[nn.Module]: ...
    def parameter_split(self, name: str) -> ParameterSplit: ...


class ModelDescription(Costs, Protocol):
    """What the engine needs to know of the whole model's shape."""

    @property
    def width(self) -> int: ...
    @property
    def tied(self) -> bool: ...


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's tensors; allocates nothing."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
