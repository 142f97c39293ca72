"""The decoding loop that `Engine` and `AriaForConditionalGeneration.generate` share.

T tokens of all prompts end to end, N sequences, V vocabulary, Q picture tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aria.engine.sampler import Draw, sample
from aria.model import Aria, Cached
from aria.ops import Segments


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one place, before temperature and truncation."""

    chosen: float
    likeliest: list[tuple[int, float]]


class Generation:
    """Decodes several prompts together, one token of each a step; sequences leave as they end."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Aria,
        input_ids_T: Tensor,
        segments: Segments,
        image_features_QD: Tensor | None,
        draws: Sequence[Sequence[Draw]],
        max_tokens: Sequence[int],
        logprobs: int | None = None,
    ):
        """Read the prompts.

        Args:
            model: the model, whose device holds the tensors too.
            input_ids_T, segments: the prompts, packed.
            image_features_QD: picture tokens of all prompts in order, or None.
            draws: for each prompt, how each of its answers is drawn; answers are numbered in this order.
            max_tokens: for each prompt, the most tokens that any of its answers may get.
            logprobs: also compute log-probabilities with so many likeliest tokens.
        """
        assert len(draws) == len(segments.lengths), "draws for every prompt"
        self._model = model
        self._draws = [draw for prompt in draws for draw in prompt]
        self._answers = list(range(len(self._draws)))
        self._logprobs = logprobs
        text, weight = model.config.text, model.language_model.lm_head.weight
        room = max(length + more for length, more in zip(segments.lengths, max_tokens, strict=True))
        self._cache = Cached(text, segments, room, weight.dtype, weight.device)
        output = model(input_ids_T, self._cache, image_features_QD)
        rows = [row for row, prompt in enumerate(draws) for _ in prompt]
        if len(rows) != len(draws):
            self._cache.select(rows)
        self._logits = model.logits(output.hidden[segments.last][rows])
        self._tokens: Tensor | None = None
        self._ended: set[int] = set()

    @property
    def growing(self) -> bool:
        """Whether any answer still takes tokens."""
        return len(self._ended) < len(self._draws)

    def end(self, answer: int) -> None:
        """This answer takes no more tokens."""
        self._ended.add(answer)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int, TokenLogprobs | None]]:
        """The next token of each growing answer: the answer's number, the token, its log-probabilities if asked for."""
        if self._tokens is not None:
            self._feed(self._tokens)
        # The picture token stands for pixels that a prompt brings; the model never says it.
        self._logits[:, self._model.config.image_token_index] = float("-inf")
        self._tokens = sample(self._logits, [self._draws[answer] for answer in self._answers])
        return list(zip(self._answers, self._tokens.tolist(), self._token_logprobs(self._tokens), strict=True))

    def _feed(self, tokens_N: Tensor) -> None:
        """Give the model its own last tokens, leaving out the answers that have ended."""
        keep = [row for row, answer in enumerate(self._answers) if answer not in self._ended]
        assert keep, "every answer has ended"
        if len(keep) < len(self._answers):
            tokens_N = tokens_N[keep]
            self._cache.select(keep)
            self._answers = [self._answers[row] for row in keep]
        self._cache.advance()
        self._logits = self._model.logits(self._model(tokens_N, self._cache).hidden)

    def _token_logprobs(self, tokens_N: Tensor) -> list[TokenLogprobs | None]:
        if self._logprobs is None:
            return [None] * len(self._answers)
        logprobs_NV = self._logits.float().log_softmax(-1)
        chosen = logprobs_NV.gather(-1, tokens_N[:, None])[:, 0].tolist()
        top = logprobs_NV.topk(self._logprobs, dim=-1)
        likeliest = [
            list(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        return [TokenLogprobs(*pair) for pair in zip(chosen, likeliest, strict=True)]
