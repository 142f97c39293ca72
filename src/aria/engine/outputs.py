"""Results of the engine, and completions while they are generated: stop texts and incremental detokenization."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aria.engine.matcher import End
from aria.processor.tokenizer import AriaTokenizer, TextStream

FinishReason = Literal["stop", "length", "error"]
"""``"error"``: following the grammar took too much work, so the answer is incomplete."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token (natural logarithm), before temperature and truncation."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The most likely tokens at this position, most likely first."""
    rank: int | None = None
    """1 if no token was more likely. Only for tokens of prompts."""


@dataclass(frozen=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    """Image tokens included."""
    completion_tokens: int


@dataclass(frozen=True)
class Stats:
    """Load of an engine, and counters since it was made."""

    running: int
    """Requests in the batch. Each of ``n`` choices is a request."""
    waiting: int
    """Requests in the queue."""
    cache_usage: float
    """Fraction of the KV cache's blocks that requests use, 0 to 1. Blocks of the prefix cache alone do not count."""
    prompt_tokens: int
    """Prompt tokens of all requests, counted once per choice."""
    completion_tokens: int
    """Tokens sampled for requests that had not ended."""
    prefix_queries: int
    """Tokens looked up in the prefix cache."""
    prefix_hits: int
    """Tokens found in the prefix cache."""
    preemptions: int
    """Number of preemptions because the KV cache was full."""


@dataclass(frozen=True)
class Choice:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """All sampled tokens, including the end token or stop text."""
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Result:
    """Answers to one conversation. ``text`` and the other properties are the first choice's."""

    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Log-probabilities of the prompt's tokens, if requested; the first token has none."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs


class StopMatcher:
    """Finds stop texts in streamed text, and holds back what may become one.

    Args:
        stops: The stop texts.
        kept: Stop texts that are kept in the output.
    """

    def __init__(self, stops: Sequence[str], kept: Collection[str] = ()):
        self._stops = tuple(stops)
        self._kept = frozenset(kept)
        self._held = ""
        self.matched: str | None = None
        """The stop text that was found, or None."""

    def push(self, piece: str, *, search: bool = True) -> str:
        """Add the next piece, and return the text that is now certain to be part of the answer.

        Args:
            piece: Text that follows the previous pieces.
            search: Whether a stop text that ends in this piece counts.
        """
        assert self.matched is None, "text was added after a stop text"
        before = len(self._held)
        self._held += piece
        ends = ((self._held.find(stop, max(before - len(stop) + 1, 0)), stop) for stop in self._stops)
        found = [(at, stop) for at, stop in ends if at >= 0] if search else []
        if found:
            keep, self.matched = min(found, key=lambda one: (one[0], len(one[1])))
            keep += len(self.matched) if self.matched in self._kept else 0
        else:
            keep = len(self._held) - self._open_end()
        out, self._held = self._held[:keep], self._held[keep:]
        return out

    def flush(self) -> str:
        """End of the text: return what was held back, unless a stop text was found."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held

    def _open_end(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop text."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)


@dataclass
class Completion:
    """One answer while it is generated, up to an end token, a stop text, the end of its grammar, or its last token.

    With ``max_tokens`` of 0 it stays empty, and the first token ends it.
    """

    max_tokens: int
    end_token_ids: Collection[int]
    tokenizer: AriaTokenizer | None = None
    """Needed for text and stop texts. None collects tokens only."""
    stop: Sequence[str] = ()
    """Texts that end the answer."""
    turn_ends: Sequence[str] = ()
    """Further ones, which count as end tokens."""
    include_stop: bool = False
    """Whether texts of ``stop`` are kept in the text; with special tokens also the end token or the end of the turn."""
    min_tokens: int = 0
    """Stop texts that end within this many tokens do not count."""
    skip_special_tokens: bool = True
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        stops = (*self.stop, *self.turn_ends)
        assert self.tokenizer is not None or not stops, "stop texts need a tokenizer"
        self._stream = (
            None if self.tokenizer is None else TextStream(self.tokenizer, skip_special_tokens=self.skip_special_tokens)
        )
        kept = () if not self.include_stop else self.stop if self.skip_special_tokens else stops
        self._matcher = StopMatcher(stops, kept)

    def push(self, token_id: int, logprob: TokenLogprob | None = None, end: End | None = None) -> str:
        """Add the next token, and how it ends the grammar if it does. Returns the text that is now certain."""
        assert self.finish_reason is None, "a token was added after the end"
        if not self.max_tokens:
            self.finish_reason = "length"
            return ""
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        ended = token_id in self.end_token_ids or end in ("over", "error")
        full = len(self.token_ids) >= self.max_tokens or end is not None
        piece = ""
        if self._stream is not None:
            kept = not ended or (self.include_stop and end is None)
            fresh = self._stream.push(token_id) if kept else ""
            if ended or full:
                fresh += self._stream.flush()
            piece = self._matcher.push(fresh, search=len(self.token_ids) > self.min_tokens)
            if ended or full:
                piece += self._matcher.flush()
        self.text += piece
        if end == "error":
            self.finish_reason = "error"
        elif ended or self._matcher.matched is not None or end == "complete":
            self.finish_reason = "stop"
        elif full:
            self.finish_reason = "length"
        return piece
