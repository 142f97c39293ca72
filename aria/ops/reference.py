"""Every operation in plain PyTorch: the specification, and the path wherever nothing faster exists.

T tokens, D hidden, H heads, KV key/value heads, K head width, E experts, A experts per token, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops.segments import Segments


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis: normalised in float32, cast back, then multiplied by the weight."""
    wide = x_TD.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


def rotary_table(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(T, K)`` of the half-split rotary convention, computed in float32 and cast to ``dtype``."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles = positions_T.float()[:, None] * (1.0 / theta**exponents)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn each pair (k, k + K/2) of every head by its token's angle."""
    low, high = x_THK.chunk(2, dim=-1)
    return x_THK * cos_TK[:, None, :] + torch.cat((-high, low), dim=-1) * sin_TK[:, None, :]


def attention(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, *, causal: bool
) -> Tensor:
    """Attention within each segment; scale K^-0.5, softmax in float32.

    Args:
        q_THK: queries ``(T, H, K)``, segment after segment.
        k_SHK, v_SHK: keys and values ``(S, KV, K)``; KV divides H (grouped queries).
        queries, keys: lengths of the segments on either side, as many on both.
        causal: query i of a segment sees the keys up to ``i + len(keys) - len(queries)``.

    Returns:
        ``(T, H, K)`` in the dtype of ``q_THK``.
    """
    assert len(queries.lengths) == len(keys.lengths), "queries and keys have different numbers of segments"
    groups = q_THK.shape[1] // k_SHK.shape[1]
    outputs = []
    pieces = zip(q_THK.split(queries.lengths), k_SHK.split(keys.lengths), v_SHK.split(keys.lengths), strict=True)
    for q, k, v in pieces:
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhk,shk->hqs", q, k) * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
            scores = scores.masked_fill(later, float("-inf"))
        outputs.append(torch.einsum("hqs,shk->qhk", scores.softmax(-1, dtype=torch.float32).to(q.dtype), v))
    return torch.cat(outputs)


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts on the raw logits, then weigh the chosen by a softmax over them alone, in float32.

    Returns:
        weights ``(T, A)`` in the dtype of the logits, expert indices ``(T, A)`` int64.
    """
    chosen, index = logits_TE.topk(top_k, dim=-1)
    return chosen.softmax(-1, dtype=torch.float32).to(logits_TE.dtype), index


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last axis, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def expert_mlp(x_TD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor, weights_TA: Tensor, index_TA: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLU outputs; no capacity, no token dropped.

    Args:
        x_TD: tokens.
        fc1_EDF: ``(E, D, 2F)``, gate in the first half of the last axis, up in the second.
        fc2_EFD: ``(E, F, D)``.
        weights_TA, index_TA: from :func:`route`.
    """
    out = torch.zeros_like(x_TD)
    for expert in index_TA.unique().tolist():
        token, place = torch.where(index_TA == expert)
        y = swiglu(x_TD[token] @ fc1_EDF[expert]) @ fc2_EFD[expert]
        out.index_add_(0, token, y * weights_TA[token, place, None])
    return out
