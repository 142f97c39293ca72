"""Sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509): ranks split tokens outside attention, heads inside.

T tokens of all ranks of a group, S ranks, H heads, KV key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aria.config import TextConfig
from aria.model.context import Packed
from aria.ops import Segments


class HeadsForTokens:
    """Attention context with T / S tokens on each rank; attention itself sees all tokens and H / S heads.

    Args:
        config: Configuration of the decoder; S must divide H and KV.
        segments: Segments of all T tokens.
        group: The S ranks, in the order of their tokens.
    """

    def __init__(self, config: TextConfig, segments: Segments, group: dist.ProcessGroup):
        self._packed, self._group = Packed(config, segments), group

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Attention output ``(T / S, H, K)``; see :class:`aria.model.context.Context`."""
        S = self._group.size()
        # One all-to-all for all three: rank s gets the s-th part of the heads of each.
        shares = [x.unflatten(1, (S, -1)) for x in (q_THK, k_THK, v_THK)]
        mixed = _ToHeads.apply(torch.cat(shares, dim=2).flatten(1, 2), self._group)
        q, k, v = mixed.split([share.shape[2] for share in shares], dim=1)
        return _ToTokens.apply(self._packed.attend(layer, q, k, v), self._group)


def _to_heads(x_THK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``(T / S, H, K)`` -> ``(T, H / S, K)``."""
    S = group.size()
    parts = x_THK.unflatten(1, (S, -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    return out.flatten(0, 1)


def _to_tokens(x_THK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``(T, H / S, K)`` -> ``(T / S, H, K)``."""
    parts = x_THK.contiguous().unflatten(0, (group.size(), -1))
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    return out.transpose(0, 1).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_heads(x_THK, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_tokens(grads[0], ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_tokens(x_THK, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _to_heads(grads[0], ctx.group), None
