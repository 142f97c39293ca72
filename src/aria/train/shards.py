"""Shards of tensors: this rank's shard of a DTensor, and a DTensor from shards.

A tensor that is not sharded is its own shard, so that the same code serves one process and many.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard; shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_as(part: Tensor, like: Tensor) -> Tensor:
    """The tensor whose shard on this rank is ``part``, sharded like ``like``; shares the shard's memory.

    Its rows may have another length than those of ``like`` if every rank holds whole rows.
    """
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    if part.shape != like.to_local().shape:
        shape = torch.Size((*like.shape[:-1], part.shape[-1]))
        stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def copies(tensor: Tensor) -> int:
    """Number of ranks that hold each element."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    mesh = tensor.device_mesh
    inside = math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_replicate())
    return inside * (dist.get_world_size() // mesh.size())


def whole(tensor: Tensor) -> Tensor:
    """The global tensor, on every rank; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
