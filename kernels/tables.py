"""What is kept of every operand of every linear, on all ranks alike: the largest values of the last steps, for delayed scaling, and the error of rounding.

A rank fills in what it computes; at the end of a step the ranks' parts are joined in one exchange. So scales, and what is decided by errors, are the same under every split.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

OPERANDS = ("forward.a", "forward.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b")


class AmaxHistory:
    """Delayed scaling: all micro-batches of a step have the scales of the steps before.

    Args:
        names: all linears of the whole model, in one order on all ranks.
        length: steps that are looked back on.
    """

    def __init__(self, names: Sequence[str], length: int, device: torch.device | str = "cpu") -> None:
        self._row = {name: row for row, name in enumerate(names)}
        self._past = torch.zeros(len(names), len(OPERANDS), length, device=device)
        self._now = torch.zeros(len(names), len(OPERANDS), device=device)

    def amax(self, name: str, operand: str, current: torch.Tensor, remember: bool, length: int | None = None) -> torch.Tensor:
        """fp32 scalar: the largest of the steps before; of the operand at hand, as long as there are none.

        Args:
            current: the operand's own amax, over its slices.
            remember: whether it counts for the steps to come; not while a model is evaluated.
            length: steps that this operand looks back on; None for all that are kept.
        """
        row, column = self._row[name], OPERANDS.index(operand)
        if remember:
            torch.maximum(self._now[row, column], current, out=self._now[row, column])
        past = self._past[row, column, :length].amax()
        return torch.where(past > 0, past, current)

    @torch.no_grad()
    def end_step(self) -> None:
        """What this step has seen, on any rank, becomes the last of those before; collective. What is not finite is left out: the step was skipped, or should have been."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._now.nan_to_num_(math.inf, math.inf)  # the larger of NaN and a number depends on the rank that has it
            dist.all_reduce(self._now, op=dist.ReduceOp.MAX)
        self._past = torch.cat((self._now.nan_to_num(0.0, 0.0, 0.0)[..., None], self._past[..., :-1]), dim=-1)
        self._now.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain data by linear and operand, the newest step first; operands that were never seen are left out."""
        rows = {name: self._past[row].tolist() for name, row in self._row.items()}
        return {
            name: {op: past for op, past in zip(OPERANDS, row, strict=True) if any(past)}
            for name, row in rows.items()
            if any(map(any, row))
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; a history of another length is cut or begins with what there is.

        Raises:
            ValueError: of another model, or not a history.
        """
        length = self._past.shape[-1]
        for name, operands in state.items():
            if name not in self._row:
                raise ValueError(f"the history of scales has a linear {name} that the model has not")
            for operand, past in operands.items():
                if operand not in OPERANDS or not all(isinstance(x, float) and math.isfinite(x) and x >= 0 for x in past):
                    raise ValueError(f"the history of scales of {name}, {operand}, is not one")
                kept = torch.tensor(past[:length], dtype=torch.float32)
                self._past[self._row[name], OPERANDS.index(operand), : len(kept)] = kept


class RoundingErrors:
    """The error of rounding, over all of a step's micro-batches and ranks.

    Args:
        names: as of `AmaxHistory`.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self._row = {name: row for row, name in enumerate(names)}
        self._sums = torch.zeros(len(names), len(OPERANDS), 2, dtype=torch.float64, device=device)

    def add(self, name: str, operand: str, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """An operand before and after it was rounded."""
        sums = torch.stack(((rounded - exact).double().square().sum(), exact.double().square().sum()))
        self._sums[self._row[name], OPERANDS.index(operand)] += sums

    def collect(self) -> dict[str, dict[str, float]]:
        """The relative error |Q(x) - x| / |x| by linear and operand, of those that were rounded; collective, and what was added is forgotten."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        found = {}
        for name, row in self._row.items():
            sums = zip(OPERANDS, self._sums[row].tolist(), strict=True)
            squares = {operand: noise / signal for operand, (noise, signal) in sums if signal > 0}
            if errors := {operand: math.sqrt(square) for operand, square in squares.items() if math.isfinite(square)}:
                found[name] = errors
        self._sums.zero_()
        return found
