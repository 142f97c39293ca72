"""LayerNorm of many short rows, for the vision encoder: a program has one row per warp. T rows, D hidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.registry import Where

_ROWS = 4
"""Rows of a program, and its warps."""


@triton.jit
def _load(ptr, column, inside):
    return tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, shift_ptr, out_ptr, T, x_stride, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """A row's first HEAD columns and the remaining TAIL (1,024 + 128 of 1,152), so that few lanes are idle."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = (row < T)[:, None]
    row = row.to(tl.int64)[:, None]
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    inside = tail < D
    x = tl.load(x_ptr + row * x_stride + head[None, :], mask=exists, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + row * x_stride + tail[None, :], mask=exists & inside[None, :], other=0.0).to(tl.float32)
    if SHIFT:
        x += tl.load(shift_ptr + head)[None, :]
        y += tl.load(shift_ptr + tail, mask=inside, other=0.0)[None, :]
    mean = (tl.sum(x, 1) + tl.sum(y, 1)) / D
    x -= mean[:, None]
    y = tl.where(inside[None, :], y - mean[:, None], 0.0)
    rstd = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
    x = x * rstd * _load(weight_ptr, head, head < D)[None, :] + _load(bias_ptr, head, head < D)[None, :]
    y = y * rstd * _load(weight_ptr, tail, inside)[None, :] + _load(bias_ptr, tail, inside)[None, :]
    tl.store(out_ptr + row * D + head[None, :], x, mask=exists)
    tl.store(out_ptr + row * D + tail[None, :], y, mask=exists & inside[None, :])


@operations.layer_norm.register(Where.INFERENCE)
def layer_norm_triton(
    x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, shift_D: Tensor | None = None
) -> Tensor:
    """One pass over rows whose elements are contiguous."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == 1, "rows must be contiguous"
    assert shift_D is None or (shift_D.dtype == torch.float32 and shift_D.is_contiguous()), (
        "the shift must be float32 and contiguous"
    )
    out = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    if T:
        head = 1 << (D.bit_length() - 1)
        _layer_norm_kernel[(triton.cdiv(T, _ROWS),)](
            x_TD, weight_D, bias_D, weight_D if shift_D is None else shift_D, out, T, x_TD.stride(0), eps,
            D=D, HEAD=head, TAIL=max(16, triton.next_power_of_2(D - head)), ROWS=_ROWS, SHIFT=shift_D is not None,
            num_warps=_ROWS,
        )  # fmt: skip
    return out
