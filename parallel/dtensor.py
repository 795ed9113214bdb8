"""Small questions to tensors that may or may not be sharded."""

import logging

import torch
from torch.distributed.tensor import DTensor

# It warns that a dim cut twice is gathered in two steps; that is what its layout means.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of it; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_global_index(tensor: torch.Tensor) -> torch.Tensor:
    """The global element index (int64, on the CPU) of each element that this rank holds."""
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    else:
        shape, offset = tuple(tensor.shape), (0,) * tensor.dim()
    index = torch.zeros(shape, dtype=torch.int64)
    stride = 1
    for dim in reversed(range(tensor.dim())):
        along = (torch.arange(shape[dim]) + offset[dim]) * stride
        index += along.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
        stride *= tensor.shape[dim]
    return index
