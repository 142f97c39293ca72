"""Routed experts: tokens sorted by expert, so that each expert's weights are read once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops.lora import LoRA
from aria.ops.reference import expert_linear, rms_norm, route, swiglu


def expert_mlp(
    x_TD: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    weights_TA: Tensor,
    index_TA: Tensor,
    *,
    fc1_lora: LoRA | None = None,
    fc2_lora: LoRA | None = None,
    present: int | None = None,
) -> Tensor:
    """See :func:`aria.ops.reference.expert_mlp`. Nothing waits for the host unless :func:`waits` says so."""
    T, A = index_TA.shape
    experts, order = index_TA.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(fc1_EDF.shape[0], device=x_TD.device), right=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    order = order[:present]
    source, place_TA = order // A, place.view(T, A)
    x = copy_rows(x_TD, source, place_TA)
    adapters = (fc1_lora, fc2_lora)
    if x.is_cuda and x.dtype == torch.bfloat16 and all(n % 8 == 0 for n in _sizes(fc1_EDF, fc2_EFD, *adapters)):
        offsets = ends.int()
        hidden = swiglu(_grouped(x, fc1_EDF, fc1_lora, offsets))
        y = _grouped(hidden, fc2_EFD, fc2_lora, offsets)
    else:
        y = _loop(x, fc1_EDF, fc2_EFD, ends.tolist(), *adapters)
    return sum_rows(y * weights_TA.flatten().gather(0, order)[:, None], source, place_TA)


def _sizes(fc1_EDF: Tensor, fc2_EFD: Tensor, *adapters: LoRA | None) -> list[int]:
    """Sizes that grouped products step over in memory."""
    return [*fc1_EDF.shape[1:], *fc2_EFD.shape[1:], *(adapter.a.shape[-1] for adapter in adapters if adapter)]


def _grouped(x: Tensor, weight: Tensor, adapter: LoRA | None, offsets: Tensor) -> Tensor:
    y = F.grouped_mm(x, weight, offs=offsets)
    if adapter is None:
        return y
    a, b, scaling, dropout = adapter.to(x)
    thin = F.grouped_mm(F.dropout(x, dropout) if dropout else x, a, offs=offsets) * scaling
    return y + F.grouped_mm(thin, b, offs=offsets)


def waits(x_TD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor) -> bool:
    """Whether :func:`expert_mlp` asks the device how many tokens each expert has, which no CUDA graph may.

    PyTorch's grouped product does so too, except on the two generations of data-centre GPUs that it has kernels for.
    """
    sizes = (*fc1_EDF.shape[1:], *fc2_EFD.shape[1:])
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16 or any(n % 8 for n in sizes):
        return True
    return torch.cuda.get_device_capability(x_TD.device)[0] not in (9, 10)


def moe_layer(
    x_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    router_ED: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    top_k: int,
) -> Tensor:
    """See :func:`aria.ops.reference.moe_layer`: operation by operation, for sizes that no kernel takes."""
    gate, up, down = shared
    normed = rms_norm(x_TD, norm_D, eps)
    routed = expert_mlp(normed, fc1_EDF, fc2_EFD, *route(F.linear(normed, router_ED), top_k))
    return x_TD + routed + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def copy_rows(x_TD: Tensor, source_P: Tensor, place_TC: Tensor) -> Tensor:
    """Copies of tokens' rows in another order, ``(P, D)``: ``x[source]``.

    The gradient adds each token's copies up in the order of their places, where that of an index would sort the
    indices again and scatter.

    Args:
        x_TD: one row for each token.
        source_P: the token of each copy.
        place_TC: the rows of each token's copies; P or above where it has fewer than C.
    """
    return cast(Tensor, _CopyRows.apply(x_TD, source_P, place_TC))


def sum_rows(y_PD: Tensor, source_P: Tensor, place_TC: Tensor) -> Tensor:
    """Sum of each token's rows, ``(T, D)``: what :func:`copy_rows` took apart, together again, in a fixed order."""
    return cast(Tensor, _SumRows.apply(y_PD, source_P, place_TC))


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x[source]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grads[0], *ctx.saved_tensors), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum(y, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        return grads[0][source], None, None


def _sum(y: Tensor, place: Tensor) -> Tensor:
    if (rows := len(y)) < place.numel():
        y, place = torch.cat((y, y.new_zeros(1, *y.shape[1:]))), place.clamp(max=rows)
    return y[place].sum(1)


def _loop(x: Tensor, fc1: Tensor, fc2: Tensor, ends: list[int], fc1_lora: LoRA | None, fc2_lora: LoRA | None) -> Tensor:
    starts = [0, *ends[:-1]]
    # Without any tokens the first expert still takes part, so that what trains has a gradient, of zeros.
    used = [(e, *span) for e, span in enumerate(zip(starts, ends, strict=True)) if span[1] > span[0]] or [(0, 0, 0)]
    pieces = []
    for e, start, end in used:
        hidden = swiglu(expert_linear(x[start:end], fc1[e], fc1_lora, e))
        pieces.append(expert_linear(hidden, fc2[e], fc2_lora, e))
    return torch.cat(pieces)
