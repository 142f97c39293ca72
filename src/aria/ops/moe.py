"""Routed experts in PyTorch: tokens sorted by expert, so that each expert's weights are read once.

T tokens, D hidden, E experts, A experts per token, F expert width, P the rows sorted by expert: T * A, or fewer where
experts are on other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops import operations
from aria.ops.lora import LoRA
from aria.ops.multi_lora import MoEAdapters, MultiLoRA, mask_other_adapters
from aria.ops.reference import expert_linear, rms_norm, route, swiglu
from aria.ops.registry import Where
from aria.ops.weights import ExpertWeights, MoEWeights


def _graph_safe(x_TD: Tensor, experts: ExpertWeights, *_: object, **__: object) -> bool:
    return not experts.products_wait(x_TD)


@operations.expert_mlp.register(Where.ANYWHERE, graph_safe=_graph_safe)
def expert_mlp_sorted(
    x_TD: Tensor, experts: ExpertWeights, weights_TA: Tensor, index_TA: Tensor, *, present: int | None = None
) -> Tensor:
    """Experts over sorted tokens. Nothing waits for the host unless :meth:`ExpertWeights.products_wait`."""
    T, A = index_TA.shape
    fc1_EDF, fc2_EFD, *loras = experts
    chosen, order = index_TA.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(fc1_EDF.shape[0], device=x_TD.device), right=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    order = order[:present]
    source, place_TA = order // A, place.view(T, A)
    x = copy_rows(x_TD, source, place_TA)
    if x.is_cuda and x.dtype == torch.bfloat16 and all(n % 8 == 0 for n in _sizes(fc1_EDF, fc2_EFD, *loras)):
        offsets = ends.int()
        hidden = swiglu(_grouped(x, fc1_EDF, loras[0], offsets))
        y = _grouped(hidden, fc2_EFD, loras[1], offsets)
    else:
        y = _loop(x, experts, ends.tolist())
    return sum_rows(y * weights_TA.flatten().gather(0, order)[:, None], source, place_TA)


@operations.multi_lora_expert_mlp.register(Where.ANYWHERE, graph_safe=_graph_safe)
def multi_lora_expert_mlp_sorted(
    x_TD: Tensor, experts: ExpertWeights, weights_TA: Tensor, index_TA: Tensor, adapters: MoEAdapters
) -> Tensor:
    """The same with each token's own LoRA weights, without gradients."""
    T, A = index_TA.shape
    fc1_EDF, fc2_EFD, *_ = experts
    chosen, order = index_TA.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(fc1_EDF.shape[0], device=x_TD.device), right=True)
    token_P = order // A
    x_PD, ids_P = x_TD[token_P], adapters.adapter_ids[token_P]
    if not experts.products_wait(x_TD):
        offsets = ends.int()
        hidden_PF = swiglu(_multi_lora_grouped(x_PD, fc1_EDF, adapters.fc1, ids_P, offsets))
        y_PD = _multi_lora_grouped(hidden_PF, fc2_EFD, adapters.fc2, ids_P, offsets)
    else:
        y_PD = _multi_lora_loop(x_PD, experts, adapters, ids_P, ends.tolist())
    y_TAD = torch.empty_like(y_PD).index_copy_(0, order, y_PD).view(T, A, -1)
    return (y_TAD * weights_TA[:, :, None]).sum(1)


def _layer_graph_safe(x_TD: Tensor, weights: MoEWeights, adapters: MoEAdapters | None = None) -> bool:
    return not weights.experts.products_wait(x_TD)


@operations.moe_layer.register(Where.ANYWHERE, graph_safe=_layer_graph_safe)
def moe_layer_composed(x_TD: Tensor, weights: MoEWeights, adapters: MoEAdapters | None = None) -> Tensor:
    """A layer operation by operation, for sizes and adapters that no kernel takes."""
    gate, up, down = weights.shared
    if adapters is None:
        normed = rms_norm(x_TD, weights.norm, weights.eps)
        chosen = route(F.linear(normed, weights.router), weights.top_k)
        routed = expert_mlp_sorted(normed, weights.experts, *chosen)
        return x_TD + routed + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)

    def add(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA | None) -> Tensor:
        return y_TO if lora is None else operations.multi_lora_linear_add(y_TO, x_TI, lora, adapters.adapter_ids)

    normed = operations.rms_norm(x_TD, weights.norm, weights.eps)
    chosen = operations.route(F.linear(normed, weights.router), weights.top_k)
    routed = operations.multi_lora_expert_mlp(normed, weights.experts, *chosen, adapters)
    gate_up = torch.cat((F.linear(normed, gate), F.linear(normed, up)), dim=-1)
    hidden = swiglu(add(gate_up, normed, adapters.gate_up))
    return x_TD + add(routed + F.linear(hidden, down), hidden, adapters.down)


def _sizes(fc1_EDF: Tensor, fc2_EFD: Tensor, *loras: LoRA | None) -> list[int]:
    """Sizes that grouped products step over in memory."""
    return [*fc1_EDF.shape[1:], *fc2_EFD.shape[1:], *(lora.a.shape[-1] for lora in loras if lora)]


def _grouped(x: Tensor, weight: Tensor, lora: LoRA | None, offsets: Tensor) -> Tensor:
    y = F.grouped_mm(x, weight, offs=offsets)
    if lora is None:
        return y
    a, b, scaling, dropout = lora.to(x)
    narrow = F.grouped_mm(F.dropout(x, dropout) if dropout else x, a, offs=offsets) * scaling
    return y + F.grouped_mm(narrow, b, offs=offsets)


def _loop(x: Tensor, experts: ExpertWeights, ends: list[int]) -> Tensor:
    fc1, fc2, fc1_lora, fc2_lora = experts
    starts = [0, *ends[:-1]]
    # Without any tokens the first expert still runs, so that trained weights get gradients, of zeros.
    used = [(e, *span) for e, span in enumerate(zip(starts, ends, strict=True)) if span[1] > span[0]] or [(0, 0, 0)]
    pieces = []
    for e, start, end in used:
        hidden = swiglu(expert_linear(x[start:end], fc1[e], fc1_lora, e))
        pieces.append(expert_linear(hidden, fc2[e], fc2_lora, e))
    return torch.cat(pieces)


def _multi_lora_grouped(x: Tensor, weight: Tensor, lora: MultiLoRA | None, ids: Tensor, offsets: Tensor) -> Tensor:
    y = F.grouped_mm(x, weight, offs=offsets)
    if lora is None:
        return y
    narrow = mask_other_adapters(F.grouped_mm(x, lora.a, offs=offsets), lora, ids)
    return y.add_(F.grouped_mm(narrow, lora.b, offs=offsets))


def _multi_lora_loop(
    x: Tensor, experts: ExpertWeights, adapters: MoEAdapters, ids: Tensor, ends: Sequence[int]
) -> Tensor:
    def product(x: Tensor, weight: Tensor, lora: MultiLoRA | None, ids: Tensor, expert: int) -> Tensor:
        y = x @ weight[expert]
        return y if lora is None else y + mask_other_adapters(x @ lora.a[expert], lora, ids) @ lora.b[expert]

    pieces = []
    for expert, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        if end > start:
            own = ids[start:end]
            hidden = swiglu(product(x[start:end], experts.fc1, adapters.fc1, own, expert))
            pieces.append(product(hidden, experts.fc2, adapters.fc2, own, expert))
    return torch.cat(pieces)


def copy_rows(x_TD: Tensor, source_P: Tensor, place_TC: Tensor) -> Tensor:
    """Copy tokens' rows in another order, ``(P, D)``: ``x[source]``.

    The gradient sums each token's copies in the order of their places, where that of indexing would sort the indices
    again and scatter.

    Args:
        x_TD: One row for each token.
        source_P: The token of each copy.
        place_TC: The rows of each token's copies; P or above where it has fewer than C.
    """
    return cast(Tensor, _CopyRows.apply(x_TD, source_P, place_TC))  # type: ignore[no-untyped-call]


def sum_rows(y_PD: Tensor, source_P: Tensor, place_TC: Tensor) -> Tensor:
    """Sum of each token's rows in a fixed order, ``(T, D)``: the opposite of :func:`copy_rows`."""
    return cast(Tensor, _SumRows.apply(y_PD, source_P, place_TC))  # type: ignore[no-untyped-call]


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
