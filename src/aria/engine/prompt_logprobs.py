"""Log-probabilities of a prompt's own tokens, computed as its chunks are prefilled.

P tokens of the prompt, N tokens of a chunk, V vocabulary, k most likely tokens at each position.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOGETHER = 256
"""Tokens whose logits are in memory at once: about as many as sampling for a full batch needs."""


class ScoredTokens(NamedTuple):
    """Log-probabilities of N tokens, each given those before it."""

    logprobs: Tensor
    """float32 ``(N,)``, natural logarithms."""
    ranks: Tensor
    """int64 ``(N,)``, 1 if no token is more likely."""
    top_ids: Tensor
    """int64 ``(N, k)``, most likely first."""
    top_logprobs: Tensor
    """float32 ``(N, k)``."""

    @staticmethod
    def of(logits_NV: Tensor, tokens_N: Tensor, k: int) -> ScoredTokens:
        """Compute them from logits. A prompt may contain any token, so none is banned here, unlike in sampling."""
        logprobs_NV = logits_NV.float().log_softmax(-1)
        chosen_N1 = logprobs_NV.gather(1, tokens_N[:, None].long())
        values, ids = logprobs_NV.topk(min(k, logprobs_NV.shape[1]), dim=-1)
        return ScoredTokens(chosen_N1[:, 0], (logprobs_NV > chosen_N1).sum(-1) + 1, ids, values)

    @staticmethod
    def cat(parts: list[ScoredTokens]) -> ScoredTokens:
        """Concatenate portions."""
        return ScoredTokens(*map(torch.cat, zip(*parts, strict=True)))


class PromptLogprobs:
    """Log-probabilities of a whole prompt, filled from the front.

    Args:
        tokens: P.
        k: Number of most likely tokens to keep at each position.
    """

    def __init__(self, tokens: int, k: int):
        self.known = 1
        """Number of leading tokens that are done. The first token has no log-probability."""
        self.logprobs = np.zeros(tokens, dtype=np.float32)
        self.ranks = np.zeros(tokens, dtype=np.int64)
        self.top_ids = np.zeros((tokens, k), dtype=np.int64)
        self.top_logprobs = np.zeros((tokens, k), dtype=np.float32)

    @property
    def complete(self) -> bool:
        """Whether all tokens are done."""
        return self.known == len(self.logprobs)

    def put(self, first: int, scored: ScoredTokens) -> None:
        """Store values of tokens from ``first`` on. After a preemption some may come twice."""
        assert first <= self.known, f"tokens {self.known} to {first} of a prompt are missing"
        places = slice(first, first + len(scored.logprobs))
        self.logprobs[places], self.ranks[places] = scored.logprobs, scored.ranks
        self.top_ids[places], self.top_logprobs[places] = scored.top_ids, scored.top_logprobs
        self.known = max(self.known, places.stop)
