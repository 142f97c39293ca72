"""Log-probabilities of a prompt's own tokens, as its chunks are read.

P tokens of the prompt, N tokens of a chunk, V vocabulary, k likeliest tokens of each place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOGETHER = 256
"""Tokens whose scores over the vocabulary are in memory at once: about what sampling for a full batch takes."""


class ScoredTokens(NamedTuple):
    """Of N tokens, each given those before it."""

    logprobs: Tensor
    """float32 ``(N,)``: natural logarithms of their probabilities."""
    ranks: Tensor
    """int64 ``(N,)``: 1 where no token was likelier."""
    top_ids: Tensor
    """int64 ``(N, k)``, likeliest first."""
    top_logprobs: Tensor
    """float32 ``(N, k)``."""

    @staticmethod
    def of(logits_NV: Tensor, tokens_N: Tensor, k: int) -> ScoredTokens:
        """Read off scores. Unlike drawn tokens, those of a prompt may be any, so none counts as impossible."""
        logprobs_NV = logits_NV.float().log_softmax(-1)
        chosen_N1 = logprobs_NV.gather(1, tokens_N[:, None].long())
        values, ids = logprobs_NV.topk(min(k, logprobs_NV.shape[1]), dim=-1)
        return ScoredTokens(chosen_N1[:, 0], (logprobs_NV > chosen_N1).sum(-1) + 1, ids, values)

    @staticmethod
    def cat(parts: list[ScoredTokens]) -> ScoredTokens:
        """One after the other."""
        return ScoredTokens(*map(torch.cat, zip(*parts, strict=True)))


class PromptLogprobs:
    """What is known of a prompt's tokens, filled from the front.

    Args:
        tokens: P.
        k: as above.
    """

    def __init__(self, tokens: int, k: int):
        self.known = 1
        """Leading tokens of which all is known; of the first there is nothing to know."""
        self.logprobs = np.zeros(tokens, dtype=np.float32)
        self.ranks = np.zeros(tokens, dtype=np.int64)
        self.top_ids = np.zeros((tokens, k), dtype=np.int64)
        self.top_logprobs = np.zeros((tokens, k), dtype=np.float32)

    @property
    def complete(self) -> bool:
        """Whether all of it has come."""
        return self.known == len(self.logprobs)

    def put(self, first: int, scored: ScoredTokens) -> None:
        """Tokens from ``first`` on; after a preemption some may come a second time."""
        assert first <= self.known, f"tokens {self.known} to {first} of a prompt were left out"
        places = slice(first, first + len(scored.logprobs))
        self.logprobs[places], self.ranks[places] = scored.logprobs, scored.ranks
        self.top_ids[places], self.top_logprobs[places] = scored.top_ids, scored.top_logprobs
        self.known = max(self.known, places.stop)
