"""Weights that are adjacent in memory and can be read as one. O outputs of a linear layer, I inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether tensors follow one another in one storage, with equal shapes except for the first axis."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if not weight.is_contiguous() or weight.data_ptr() != end or weight.shape[1:] != first.shape[1:]:
            return False
        end += weight.nbytes
    return len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def as_one(weights: Sequence[Tensor]) -> Tensor:
    """Adjacent tensors as one, ``(sum of O, I)``, without a copy."""
    assert adjacent(weights), "the weights are not adjacent in memory; lay_out() was not called"
    first = weights[0]
    return first.detach().as_strided((sum(weight.shape[0] for weight in weights), *first.shape[1:]), first.stride())
