"""LoRA weights of several adapters in one batch: each token gets what its own adapter adds.

I inputs and O outputs of a linear layer, E experts, R ranks of all adapters together.

The ranks of all adapters lie side by side, so one narrow product serves every token; of its result a token keeps its
own adapter's ranks, and zeros for the others. The work depends on which adapters are loaded and not on who uses them:
nothing is sorted by adapter, nothing waits for the host, and the rest of the batch changes no sum. The price is that
each step reads all adapters, which at 64 ranks is a twentieth of what Aria's experts take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aria.ops.lora import LoRA

ALIGNMENT = 8
"""Grouped products step over ranks in 16 bytes, so the ranks are padded to a multiple of 8."""


class MultiLoRA(NamedTuple):
    """LoRA weights of several adapters for one weight, side by side; their scaling is part of ``b``."""

    a: Tensor
    """``(R, I)`` beside a linear layer's weight, ``(E, I, R)`` beside those of E experts."""
    b: Tensor
    """``(O, R)``, or ``(E, R, O)``."""
    adapter_ids: Tensor
    """int32 ``(R,)``: the adapter of each rank, from 1 on; -1 for padding. Adapter id 0 is the base model."""


class MoEAdapters(NamedTuple):
    """LoRA weights of a layer's mixture of experts, None where a weight has none, and each token's adapter id."""

    adapter_ids: Tensor
    """int32, 0 for the base model."""
    fc1: MultiLoRA | None = None
    fc2: MultiLoRA | None = None
    gate_up: MultiLoRA | None = None
    """Of the shared experts."""
    down: MultiLoRA | None = None

    @property
    def loras(self) -> tuple[MultiLoRA | None, ...]:
        """The LoRA weights alone."""
        return self[1:]


def stack_loras(parts: Sequence[tuple[int, int, LoRA]], outputs: int, like: Tensor) -> MultiLoRA:
    """Put LoRA weights of several adapters side by side.

    Args:
        parts: Adapter id, first output and LoRA weights, whose outputs may be some of many: those of q among those of
            q, k and v.
        outputs: O.
        like: Has the dtype and device of the weight.

    Raises:
        ValueError: Values are not finite in that dtype. Zero times one of them would spoil tokens of other adapters.
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


def mask_other_adapters(h: Tensor, lora: MultiLoRA, adapter_ids: Tensor) -> Tensor:
    """Set to zero, in place, the ranks that do not belong to each row's adapter.

    Not by a product: infinities of another adapter must not become NaN. Not by ``torch.where``: its zero would be
    copied to the device, which a CUDA graph cannot contain.
    """
    return h.masked_fill_(lora.adapter_ids != adapter_ids[:, None], 0)
