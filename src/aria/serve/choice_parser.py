"""`ChoiceParser`: the engine's tokens -> text, tool calls and log-probabilities of one choice, incrementally."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aria.engine import Piece, TokenLogprob
from aria.processor import AriaTokenizer
from aria.serve.generation_request import GenerationRequest
from aria.serve.tool_calls import Call, CallReader, UntaggedCallReader


@dataclass(slots=True)
class ChoiceDelta:
    """What a token adds to a choice."""

    parts: list[str | Call]
    """Text and calls, in order."""
    logprobs: list[TokenLogprob]
    """Log-probabilities of the tokens of the text."""
    finish_reason: str | None
    """Set by the last token: stop, length or tool_calls."""


class ChoiceParser:
    """Parses the tokens of one choice."""

    def __init__(self, request: GenerationRequest, tokenizer: AriaTokenizer):
        names = request.functions
        self._calls = None if not names else UntaggedCallReader(names) if request.untagged else CallReader(names)
        params = request.params
        self._ledger = None if params.logprobs is None else _LogprobBuffer(tokenizer, params.skip_special_tokens)
        self._parallel = request.parallel
        self._called = False
        self.finished = False
        """Whether the choice is complete, though the engine may still generate."""

    def push(self, piece: Piece) -> ChoiceDelta:
        """Add the next token."""
        if self.finished:
            return ChoiceDelta([], [], None)
        text, finish = piece.text, piece.finish_reason
        parts: list[str | Call]
        if self._calls is None:
            parts = [text] if text else []
        else:
            parts = self._calls.push(text) if text else []
            if finish is not None:
                parts += self._calls.flush()
            first = next((i for i, part in enumerate(parts) if isinstance(part, Call)), None)
            self._called = self._called or first is not None
            if first is not None and not self._parallel:
                parts, finish = parts[: first + 1], "stop"
        logprobs = [] if self._ledger is None else list(self._ledger.push(piece))
        self.finished = finish is not None
        return ChoiceDelta(parts, logprobs, "tool_calls" if finish == "stop" and self._called else finish)


class _LogprobBuffer:
    """Holds back the log-probability of a token until its text is final; tokens of a stop text are dropped."""

    def __init__(self, tokenizer: AriaTokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._held: deque[tuple[int, TokenLogprob]] = deque()
        self._read = 0
        self._certain = 0

    def push(self, piece: Piece) -> Iterable[TokenLogprob]:
        assert piece.logprob is not None, "log-probabilities were requested"
        assert piece.token_id is not None, "responses to messages have at least one token"
        self._held.append((self._read, piece.logprob))
        self._read += len(self._tokenizer.token_bytes(piece.token_id, skip_special_tokens=self._skip))
        self._certain += len(piece.text.encode())
        if piece.finish_reason == "length":
            self._certain = self._read + 1
        while self._held:
            start, logprob = self._held[0]
            end = self._held[1][0] if len(self._held) > 1 else self._read
            # A token in whose middle a stop text begins is partly text; others wait until all of their text is final.
            certain = start < self._certain if piece.finish_reason else end <= self._certain and end > start
            if not certain:
                return
            self._held.popleft()
            yield logprob


def logprob_object(logprob: TokenLogprob, tokenizer: AriaTokenizer) -> dict[str, Any]:
    """A token with its log-probability and the most likely alternatives, in OpenAI's format."""
    return {**_token(logprob, tokenizer), "top_logprobs": [_token(other, tokenizer) for other in logprob.top]}


def _token(logprob: TokenLogprob, tokenizer: AriaTokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(logprob.token_id)
    return {"token": logprob.token, "logprob": logprob.logprob, "bytes": list(data)}
