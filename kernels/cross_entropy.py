"""The head and its cross entropy in one, chunk by chunk: logits of more than a few hundred tokens are never held, in any precision.

The gradients are computed beside the loss, while a chunk's logits are there, and only scaled in the backward pass: nothing is computed again.
The idea is common property (Liger kernel, "cut cross entropy"); the vocabulary may be split over a group, then two small sums per chunk
join the parts and no rank sees another's logits.
"""

from typing import Any

import torch
import torch.distributed as dist

_CHUNK_VALUES = 1 << 22  # logits held at once: 16 MiB in fp32


def chunk_tokens(vocabulary: int) -> int:
    """Tokens per chunk for a (local) vocabulary."""
    return max(64, _CHUNK_VALUES // max(vocabulary, 1))


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor,
    z_loss: float = 0.0, group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """sum_n weights_n (nll_n + z_loss log(Z_n)^2) as fp32 [1], differentiable in hidden and weight, and nll fp32 [N] in nats, not differentiable.

    z-loss as in PaLM (arXiv 2204.02311, section 5). In a group, `weight_VD` is this rank's range of the vocabulary, the results are those of
    the whole, and hidden's gradient is this rank's part of a sum. Matrix products are taken in the autocast dtype or hidden's.
    """
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
    wants = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, weights_N, z_loss, group, dtype, wants)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_loss: float,
                group: dist.ProcessGroup | None, dtype: torch.dtype, wants: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        matrix = weight.to(dtype)
        first = group.rank() * weight.shape[0] if group else 0
        grad_hidden = torch.empty_like(hidden) if wants else None
        grad_weight = torch.zeros_like(matrix, dtype=torch.float32) if wants else None
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        total = hidden.new_zeros(1, dtype=torch.float32)
        size = chunk_tokens(weight.shape[0])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            x, weigh = hidden[rows].to(dtype), weights[rows].float()
            logits = (x @ matrix.t()).float()
            label = labels[rows].long() - first
            here = (label >= 0) & (label < weight.shape[0])
            index = label.clamp(0, weight.shape[0] - 1)[:, None]
            sums, log_z = _exp_in_place(logits, label_logit := torch.where(here, logits.gather(1, index)[:, 0], 0.0), group)
            nll[rows] = log_z - label_logit
            total += (weigh * (nll[rows] + z_loss * log_z.square())).sum()
            if grad_hidden is not None and grad_weight is not None:
                # d/dlogit = weight * ((1 + 2 z log Z) softmax - onehot); the softmax is what `logits` holds over its sums.
                logits.mul_((weigh * (1 + 2 * z_loss * log_z) / sums)[:, None])
                logits.scatter_add_(1, index, torch.where(here, -weigh, 0.0)[:, None])
                slope = logits.to(dtype)
                grad_hidden[rows] = slope @ matrix
                grad_weight.add_((slope.t() @ x).float()) if dtype != torch.float32 else grad_weight.addmm_(slope.t(), x)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (grad_hidden * scale).to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), *[None] * 6


def _exp_in_place(logits: torch.Tensor, label_logit: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits [n, V] into exp(logits - peak) in place; returns their sums [n] and log Z [n]. In a group, all ranks' logits are summed over,
    and `label_logit` too."""
    peak = logits.amax(dim=1)
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(peak[:, None]).exp_()
    sums = logits.sum(dim=1)
    if group is not None:
        both = torch.stack((sums, label_logit))
        dist.all_reduce(both, group=group)
        sums = both[0]
        label_logit.copy_(both[1])
    return sums, sums.log() + peak
