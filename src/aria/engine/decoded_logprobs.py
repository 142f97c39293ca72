"""Log-probabilities with the tokens' text, as results have them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from aria.engine.outputs import TokenLogprob
from aria.engine.prompt_logprobs import PromptLogprobs
from aria.engine.runner import TokenLogprobs
from aria.processor import AriaTokenizer


def decoded_logprob(tokenizer: AriaTokenizer, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
    """Log-probabilities of a sampled token, with the tokens' text."""
    top = tuple(TokenLogprob(id, tokenizer.decode([id]), value) for id, value in logprobs.likeliest)
    return TokenLogprob(token_id, tokenizer.decode([token_id]), logprobs.chosen, top)


def decoded_prompt_logprobs(
    tokenizer: AriaTokenizer, prompt: Sequence[int], logprobs: PromptLogprobs
) -> tuple[TokenLogprob | None, ...]:
    """Log-probabilities of a prompt, with the tokens' text. The first token has none."""

    @cache
    def text(token: int) -> str:
        return tokenizer.decode([token])

    found: list[TokenLogprob | None] = []
    columns = logprobs.logprobs, logprobs.ranks, logprobs.top_ids, logprobs.top_logprobs
    for token, logprob, rank, ids, values in zip(prompt, *(column.tolist() for column in columns), strict=True):
        likeliest = enumerate(zip(ids, values, strict=True), 1)
        top = tuple(TokenLogprob(other, text(other), value, rank=place) for place, (other, value) in likeliest)
        found.append(TokenLogprob(token, text(token), logprob, top, rank))
    return (None, *found[1:])
