"""Low-rank adapters of many requests in one step: each token gets what its own adapter adds, and nothing of others.

T tokens, I inputs and O outputs of a linear, E experts, A experts per token, F expert width, P the T * A pairs of a
token and an expert, R ranks of all adapters together.

The ranks of all adapters lie side by side, so one thin product reads them for everybody; of its result a token keeps
its own adapter's ranks, and zeros for the others. So the work depends on which adapters there are and not on who asks
for them: nothing is sorted by adapter, nothing waits for the host, and who shares a step changes no sum. The price is
that each step reads all adapters, which 64 ranks make a twentieth of what Aria's experts take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops.lora import LoRA
from aria.ops.moe import waits
from aria.ops.reference import swiglu

ALIGNMENT = 8
"""Grouped products step over ranks in 16 bytes, so these are filled up to a multiple of 8."""


class MultiLoRA(NamedTuple):
    """The adapters of one weight, side by side; their scaling is part of ``b``."""

    a: Tensor
    """``(R, I)`` beside a linear's weight, ``(E, I, R)`` beside those of E experts."""
    b: Tensor
    """``(O, R)``, or ``(E, R, O)``."""
    adapter_ids: Tensor
    """int32 ``(R,)``: whose rank this is, from 1 on; -1 is nobody's. Tokens of number 0 have no adapter."""


class MoEMultiLoRA(NamedTuple):
    """The adapters of a layer's mixture of experts, by weight; None where a weight has none."""

    fc1: MultiLoRA | None = None
    fc2: MultiLoRA | None = None
    gate_up: MultiLoRA | None = None
    """Of the shared experts."""
    down: MultiLoRA | None = None


NO_LORAS = MoEMultiLoRA()


def stack_loras(parts: Sequence[tuple[int, int, LoRA]], outputs: int, like: Tensor) -> MultiLoRA:
    """Put adapters side by side.

    Args:
        parts: adapter id, first output and LoRA weights, whose outputs may be some of many: q's among those of q, k
            and v.
        outputs: O.
        like: the weight's dtype and device.

    Raises:
        ValueError: values are not finite in that dtype. A zero times one of them would spoil tokens of all others.
    """
    assert parts, "there are no weights to stack"
    experts = parts[0][2].a.ndim == 3
    inputs = parts[0][2].a.shape[1]
    ranks = [lora.a.shape[-1 if experts else 0] for _, _, lora in parts]
    R = -(-sum(ranks) // ALIGNMENT) * ALIGNMENT
    E = parts[0][2].a.shape[:1] if experts else ()
    # Rank is b's last axis beside a linear and a's beside experts: here it is always the first of both.
    a, b = (like.new_zeros(R, *E, size, dtype=torch.float32, requires_grad=False) for size in (inputs, outputs))
    adapter_ids = torch.full((R,), -1, dtype=torch.int32)
    at = 0
    for (adapter_id, first, lora), rank in zip(parts, ranks, strict=True):
        rows = slice(at, at + rank)
        a[rows] = lora.a.detach().movedim(-1 if experts else 0, 0)
        b[rows, ..., first : first + _outputs(lora)] = lora.b.detach().movedim(1, 0) * lora.scaling
        adapter_ids[rows] = adapter_id
        at += rank
    a, b = a.to(like.dtype), b.to(like.dtype)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(
            f"an adapter's values, times its scaling, are not finite in {like.dtype}; "
            "serve the model in a dtype that holds them"
        )
    if experts:
        return MultiLoRA(a.movedim(0, -1).contiguous(), b.transpose(0, 1).contiguous(), adapter_ids.to(like.device))
    return MultiLoRA(a, b.t().contiguous(), adapter_ids.to(like.device))


def _outputs(lora: LoRA) -> int:
    return lora.b.shape[-1 if lora.b.ndim == 3 else 0]


def multi_lora_linear_add(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA, adapter_ids_T: Tensor) -> Tensor:
    """``y`` and what each token's adapter adds to a linear of ``x``.

    Args:
        y_TO: the linear's output, or that with a residual.
        x_TI: its input.
        lora: the adapters.
        adapter_ids_T: int32, whose token this is; 0 is nobody's.
    """
    return torch.addmm(y_TO, mask_other_adapters(F.linear(x_TI, lora.a), lora, adapter_ids_T), lora.b.t())


def multi_lora_expert_mlp(
    x_TD: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    weights_TA: Tensor,
    index_TA: Tensor,
    loras: tuple[MultiLoRA | None, MultiLoRA | None],
    adapter_ids_T: Tensor,
) -> Tensor:
    """:func:`aria.ops.reference.expert_mlp` in which each token has its own adapters of ``fc1`` and ``fc2``.

    Nothing waits for the host where :func:`multi_lora_is_graph_safe`.
    """
    T, A = index_TA.shape
    experts, order = index_TA.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(fc1_EDF.shape[0], device=x_TD.device), right=True)
    token_P = order // A
    x_PD, adapter_ids_P = x_TD[token_P], adapter_ids_T[token_P]
    if multi_lora_is_graph_safe(x_TD, fc1_EDF, fc2_EFD):
        offsets = ends.int()
        hidden_PF = swiglu(_grouped(x_PD, fc1_EDF, loras[0], adapter_ids_P, offsets))
        y_PD = _grouped(hidden_PF, fc2_EFD, loras[1], adapter_ids_P, offsets)
    else:
        y_PD = _loop(x_PD, (fc1_EDF, fc2_EFD), loras, adapter_ids_P, ends.tolist())
    y_TAD = torch.empty_like(y_PD).index_copy_(0, order, y_PD).view(T, A, -1)
    return (y_TAD * weights_TA[:, :, None]).sum(1)


def multi_lora_is_graph_safe(x_TD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor) -> bool:
    """Whether :func:`multi_lora_expert_mlp` can be part of a CUDA graph: where grouped products ask no host how many
    tokens each expert has."""
    return not waits(x_TD, fc1_EDF, fc2_EFD)


def mask_other_adapters(h: Tensor, lora: MultiLoRA, adapter_ids: Tensor) -> Tensor:
    """Zero in place what belongs to other adapters. Not by a product: what another adapter makes infinite stays its
    own. Not by ``torch.where``: its zero would be copied to the device, which no graph may do."""
    return h.masked_fill_(lora.adapter_ids != adapter_ids[:, None], 0)


def _grouped(x: Tensor, weight: Tensor, lora: MultiLoRA | None, adapter_ids: Tensor, offsets: Tensor) -> Tensor:
    y = F.grouped_mm(x, weight, offs=offsets)
    if lora is None:
        return y
    return y.add_(
        F.grouped_mm(
            mask_other_adapters(F.grouped_mm(x, lora.a, offs=offsets), lora, adapter_ids), lora.b, offs=offsets
        )
    )


def _loop(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    loras: tuple[MultiLoRA | None, MultiLoRA | None],
    adapter_ids: Tensor,
    ends: Sequence[int],
) -> Tensor:
    def product(x: Tensor, weight: Tensor, lora: MultiLoRA | None, adapter_ids: Tensor, expert: int) -> Tensor:
        y = x @ weight[expert]
        return y if lora is None else y + mask_other_adapters(x @ lora.a[expert], lora, adapter_ids) @ lora.b[expert]

    pieces = []
    for expert, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        if end > start:
            own = adapter_ids[start:end]
            hidden = swiglu(product(x[start:end], weights[0], loras[0], own, expert))
            pieces.append(product(hidden, weights[1], loras[1], own, expert))
    return torch.cat(pieces)
