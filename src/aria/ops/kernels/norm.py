"""RMSNorm of many tokens in one pass. T tokens, D hidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.registry import Where


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, eps, x_stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """One token; WIDTH is D rounded up to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    # Rounded before multiplying by the weight, as in the reference.
    tl.store(out_ptr + token * D + column, normed.to(out_ptr.dtype.element_ty).to(tl.float32) * weight, mask=inside)


@operations.rms_norm.register(Where.INFERENCE)
def rms_norm_triton(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """One pass over rows whose elements are contiguous."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == 1 and weight_D.is_contiguous(), "rows must be contiguous"
    out = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    if T:
        _norm_kernel[(T,)](
            x_TD, weight_D, out, eps, x_TD.stride(0), D=D, WIDTH=triton.next_power_of_2(D), num_warps=4
        )  # fmt: skip
    return out
