"""Operations on GPUs by the kernels of PyTorch and cuBLAS, which are the fastest for more than one token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aria import private_api
from aria.ops import operations
from aria.ops.layout import adjacent, as_one
from aria.ops.registry import Where


@operations.rms_norm.register(Where.TRAINING)
def rms_norm_torch(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """PyTorch's own, one pass forward and one backward."""
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


@operations.linear_gelu.register(Where.INFERENCE)
def linear_gelu_fused(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """GELU in the epilogue of the product."""
    return private_api.addmm_activation(bias_O, x_TI, weight_OI.t(), use_gelu=True)


@operations.linear_add.register(Where.INFERENCE)
def linear_add_fused(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor) -> Tensor:
    """The residual as the product's initial value."""
    return torch.addmm(residual_TO, x_TI, weight_OI.t())


def _adjacent(x_TD: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> bool:
    return adjacent(weights_OD)


@operations.norm_linear.register(Where.INFERENCE, fits=_adjacent)
def norm_linear_joined(x_TD: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> Tensor:
    """One product for weights that are adjacent in memory."""
    return F.linear(operations.rms_norm(x_TD, norm_D, eps), as_one(weights_OD))
