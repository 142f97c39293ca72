"""Arguments of operations that travel together.

T tokens, D hidden, E experts, A experts per token, F expert width, W width of the shared experts, N sequences, B blocks
of the cache, S tokens of a block, M blocks of the longest sequence, KV key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aria.ops.lora import LoRA
from aria.ops.registry import Weights


class ExpertWeights(NamedTuple):
    """The routed experts, with their LoRA weights if they have any."""

    fc1: Tensor
    """``(E, D, 2F)``, gate in the first half of the last axis, up in the second."""
    fc2: Tensor
    """``(E, F, D)``."""
    fc1_lora: LoRA | None = None
    fc2_lora: LoRA | None = None

    def products_wait(self, x_TD: Tensor) -> bool:
        """Whether PyTorch's products of sorted rows ask the device how many rows each expert has, which no CUDA graph
        can contain. Its grouped product does, except on the two generations of data-center GPUs it has kernels for."""
        sizes = (*self.fc1.shape[1:], *self.fc2.shape[1:])
        if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16 or any(n % 8 for n in sizes):
            return True
        return torch.cuda.get_device_capability(x_TD.device)[0] not in (9, 10)


@dataclass(frozen=True, eq=False)
class MoEWeights(Weights):
    """The second half of a decoder layer: norm, router, routed and shared experts."""

    norm: Tensor
    eps: float
    """Of the norm."""
    router: Tensor
    fc1: Tensor
    """See :class:`ExpertWeights`."""
    fc2: Tensor
    shared: tuple[Tensor, Tensor, Tensor]
    """Gate and up ``(W, D)`` and down ``(D, W)`` of the shared experts, W a multiple of F."""
    top_k: int
    """A."""

    @property
    def experts(self) -> ExpertWeights:
        """The routed experts."""
        return ExpertWeights(self.fc1, self.fc2)


class PagedKV(NamedTuple):
    """One layer's paged KV cache, and what the kernels that read it share."""

    keys: Tensor
    """``(B, KV, S, K)``; operations that write it change it in place."""
    values: Tensor
    angles: Tensor
    """float32, see :func:`aria.ops.rope_angles`."""
    arrivals: Tensor | None = None
    """int32 counters of the kernels' programs, N x H or more. They are zeros, and every launch leaves them so; launches
    that may run at the same time need counters of their own. None: each launch makes its own."""


class Chunks(NamedTuple):
    """Chunks of N prompts, end to end."""

    blocks: Tensor
    """int32, the block table: the blocks of each chunk's sequence in order."""
    lengths: Sequence[int]
    """Tokens of each chunk."""
    pasts: Sequence[int] | None
    """Tokens of each sequence before its chunk; None if only the device knows them, as in a CUDA graph."""
    spans: Tensor | None = None
    """int32, first token, length and past of each chunk, for the kernel; None: made when needed, at the price of a
    wait for the host."""
