"""What comes back from the engine: results, and a completion as it grows, stop texts included."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aria.engine.matcher import End
from aria.processor.tokenizer import AriaTokenizer, TextStream

FinishReason = Literal["stop", "length", "error"]
"""``"error"``: the answer's grammar grew beyond its limits of work, and what there is of it is incomplete."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of the probability that the model gave a token, before temperature and truncation."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens at this place, likeliest first."""
    rank: int | None = None
    """1 where no token was likelier; known of tokens of prompts."""


@dataclass(frozen=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int
    """Image tokens included."""
    completion_tokens: int


@dataclass(frozen=True)
class Stats:
    """How an engine is doing; counters run since it was made."""

    running: int
    """Requests that have their place in the batch. Each choice of ``n`` is a request."""
    waiting: int
    """Requests that wait for one."""
    cache_usage: float
    """Part of the cache's blocks that requests hold, 0 to 1; what is kept only for later requests does not count."""
    prompt_tokens: int
    """Tokens of prompts that were taken in, counted once for each choice."""
    completion_tokens: int
    """Tokens that were sampled for requests that still wanted them."""
    prefix_queries: int
    """Tokens looked up in the prefix cache."""
    prefix_hits: int
    """Those of them that it had."""
    preemptions: int
    """Times that a request lost its place because the cache was full."""


@dataclass(frozen=True)
class Choice:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """All that was sampled, the end or stop text included."""
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Result:
    """The answers to one conversation; text and so on are the first choice's."""

    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Of each token of the prompt, where they were asked for; the first has none."""

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
    """Finds stop texts in text that comes in pieces, and holds back what may yet turn out to be one.

    Args:
        stops: the texts.
        kept: those of them that are part of the text before the end.
    """

    def __init__(self, stops: Sequence[str], kept: Collection[str] = ()):
        self._stops = tuple(stops)
        self._kept = frozenset(kept)
        self._held = ""
        self.matched: str | None = None
        """The stop text that was found."""

    def push(self, piece: str, *, search: bool = True) -> str:
        """Take the next piece; returns the text that is now certain to be part of the answer.

        Args:
            piece: the text behind what came before.
            search: whether a stop text that ends in this piece counts.
        """
        assert self.matched is None, "text came after a stop text"
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
        """No more text comes: what was held back, unless it is a stop text."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held

    def _open_end(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)


@dataclass
class Completion:
    """One answer as it grows. Ends at an end token, at a stop text, with its grammar, or at its last token.

    With ``max_tokens`` of 0 it stays empty, and the first token that comes ends it.
    """

    max_tokens: int
    end_token_ids: Collection[int]
    tokenizer: AriaTokenizer | None = None
    """Needed for text and stop texts; None keeps tokens only."""
    stop: Sequence[str] = ()
    """Texts at which the answer ends."""
    turn_ends: Sequence[str] = ()
    """More of them, which stand for end tokens."""
    include_stop: bool = False
    """Whether a text of ``stop`` is part of the text, and, where special tokens are, the end token or its text."""
    min_tokens: int = 0
    """Texts of ``stop`` that end within so many tokens do not count."""
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
        """Take the next token, and how it ends the grammar if it does; returns the text that became certain with it."""
        assert self.finish_reason is None, "a token came after the end"
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
