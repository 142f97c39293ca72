"""Layers that several components share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aria import ops


@torch.no_grad()
def join(*linears: nn.Linear) -> None:
    """Make the weights of linear layers adjacent in memory, so that one product serves all; biases likewise."""
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    for group in (weights, biases):
        if group and not ops.adjacent(group):
            for parameter, part in zip(group, torch.cat(group).split([len(x) for x in group]), strict=True):
                parameter.data = part


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight, self.eps)
