"""Layers that several organs share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aria import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight, self.eps)
