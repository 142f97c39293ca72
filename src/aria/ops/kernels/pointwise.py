"""Operations between the products of a layer, with gradients: rotary positions and routing.

T tokens, H heads, K head width, E experts, A experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels import permute
from aria.ops.registry import Where


@triton.jit(do_not_specialize=["T"])
def _rotary(
    x_ptr, cos_ptr, sin_ptr, out_ptr, T, stride, sign,
    H: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    low = tl.arange(0, HALF)[None, :]
    high = low + K // 2
    inside = (token < T) & (low < K // 2)
    head = tl.program_id(1)
    # A table may have different angles for the halves of a head, though ours does not.
    cos_low = tl.load(cos_ptr + token * K + low, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + token * K + high, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + token * K + low, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + token * K + high, mask=inside, other=0.0).to(tl.float32)
    if sign < 0:
        sin_low, sin_high = -sin_high, -sin_low
    a = tl.load(x_ptr + token * stride + head * K + low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + token * stride + head * K + high, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + (token * H + head) * K
    tl.store(out + low, a * cos_low - b * sin_low, mask=inside)
    tl.store(out + high, b * cos_high + a * sin_high, mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    T, H, K = x.shape
    if x.stride()[1:] != (K, 1):
        x = x.contiguous()
    out = torch.empty(T, H, K, dtype=x.dtype, device=x.device)
    if T:
        _rotary[triton.cdiv(T, 16), H](
            x, cos, sin, out, T, x.stride(0), sign, H=H, K=K, TOKENS=16, HALF=triton.next_power_of_2(K // 2)
        )  # fmt: skip
    return out


class _Rotary(torch.autograd.Function):
    """Saves only the angles: the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0), None, None


@operations.rotary.register(Where.TRAINING)
def rotary_train(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Angles have no gradients."""
    return _Rotary.apply(x_THK, cos_TK.contiguous(), sin_TK.contiguous())


class _Route(torch.autograd.Function):
    """The choice by the kernel for inference; the softmax's gradient, scattered to the chosen experts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        weights, index = permute.route_triton(logits, top_k)
        ctx.save_for_backward(weights, index)
        ctx.experts = logits.shape[1]
        ctx.mark_non_differentiable(index)
        return weights, index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        weights, index = ctx.saved_tensors
        weights, grad = weights.float(), grads[0].float()
        chosen = weights * (grad - (weights * grad).sum(-1, keepdim=True))
        logits = chosen.new_zeros(len(index), ctx.experts).scatter_(1, index, chosen)
        return logits.to(grads[0].dtype), None


@operations.route.register(Where.TRAINING)
def route_train(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of equal logits the lower index wins."""
    return _Route.apply(logits_TE, top_k)
