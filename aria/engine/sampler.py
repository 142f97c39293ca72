"""Scores -> tokens. N sequences, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How one sequence's next token is drawn."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    noise: torch.Generator | None = None
    """This sequence's own stream of noise, so that what it draws does not depend on the rest of the batch."""


def noise_stream(seed: int, copy: int, device: torch.device) -> torch.Generator:
    """Noise of the ``copy``-th answer under ``seed``."""
    # A large odd step keeps the copies of one seed and of its neighbours apart.
    return torch.Generator(device).manual_seed((seed + copy * 0x9E3779B97F4A7C15) % 2**63)


def sample(logits_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw one token for each sequence.

    Temperature comes first, then the ``top_k`` likeliest, then the smallest set that holds ``top_p`` of what is left.

    Returns:
        int64 ``(N,)``.
    """
    assert logits_NV.shape[0] == len(draws), "one draw for each row of scores"
    tokens = logits_NV.argmax(-1)
    rows = [n for n, draw in enumerate(draws) if draw.temperature > 0]
    if not rows:
        return tokens
    warm = [draws[n] for n in rows]
    device = logits_NV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    V = logits_NV.shape[-1]
    scores = logits_NV[rows].float()
    # From the largest score down, so that no temperature however small makes them overflow.
    scores = (scores - scores.amax(-1, keepdim=True)) / column([draw.temperature for draw in warm])
    scores, order = scores.sort(dim=-1, descending=True)
    rank = torch.arange(V, device=device)
    scores = scores.masked_fill(rank >= column([draw.top_k or V for draw in warm]), float("-inf"))
    probs = scores.softmax(-1)
    before = probs.cumsum(-1) - probs
    # 1 keeps all, also where rounding lets the sum reach it early.
    limit = column([draw.top_p if draw.top_p < 1 else float("inf") for draw in warm])
    scores = scores.masked_fill((before >= limit) & (rank > 0), float("-inf"))
    # The largest score with Gumbel noise is a draw from the softmax.
    uniform = torch.stack([torch.rand(V, generator=draw.noise, device=device) for draw in warm])
    gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float32).tiny)))
    best = (scores + gumbel).argmax(-1, keepdim=True)
    tokens[rows] = order.gather(-1, best)[:, 0]
    return tokens
