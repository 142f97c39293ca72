"""RMSNorm of many tokens in one pass, alone or behind the sum that it normalises. T tokens, D hidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, eps, x_stride, residual_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One token; WIDTH is D made a power of two."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if ADD:
        x += tl.load(residual_ptr + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(sum_ptr + token * D + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(out_ptr + token * D + column, normed.to(dtype).to(tl.float32) * weight, mask=inside)


def _launch(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    T, D = x_TD.shape
    assert x_TD.stride(1) == 1 and weight_D.is_contiguous(), "rows are contiguous"
    assert residual_TD is None or (residual_TD.shape == x_TD.shape and residual_TD.stride(1) == 1), "sums fit"
    out = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    total = x_TD if residual_TD is None else torch.empty_like(out)
    other = x_TD if residual_TD is None else residual_TD
    if T:
        _norm_kernel[(T,)](
            x_TD, other, weight_D, total, out, eps, x_TD.stride(0), other.stride(0),
            D=D, WIDTH=triton.next_power_of_2(D), ADD=residual_TD is not None, num_warps=_WARPS,
        )  # fmt: skip
    return total, out


_WARPS = 4


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row; see :func:`aria.ops.reference.rms_norm`."""
    return _launch(x_TD, None, weight_D, eps)[1]


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + residual``, rounded to their dtype, and its :func:`rms_norm`; ``(T, D)`` both."""
    return _launch(x_TD, residual_TD, weight_D, eps)
