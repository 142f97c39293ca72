"""Responses of ``/v1/completions``, complete and streamed."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from aria.engine import Piece, TokenLogprob
from aria.serve.protocol import CompletionRequest
from aria.serve.response_models import CompletionObject
from aria.serve.service import Run
from aria.serve.streaming import DONE, event


class _Text:
    """One choice, after its prompt if that is echoed. Every token has a log-probability, including the end token, which
    is not part of the text."""

    def __init__(self, run: Run, prompt: int):
        self._run, self._prompt = run, prompt
        self._echo = run.request.echo
        self._wanted = run.request.params.logprobs
        self._offset = 0
        # Counts characters whose bytes are spread over several tokens.
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    async def push(self, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of the next token."""
        text = piece.text
        known: list[TokenLogprob | None] = []
        if self._echo:
            self._echo = False
            text = self._echoed() + text
            if self._wanted is not None:
                known += await self._run.token_logprobs(self._prompt)
        if self._wanted is None:
            return text, None
        known += [piece.logprob] if piece.token_id is not None else []
        return text, self._logprobs(known)

    def _echoed(self) -> str:
        prompt = self._run.request.prompts[self._prompt]
        if isinstance(prompt, str):
            return prompt
        return self._run.tokenizer.decode(prompt)

    def _logprobs(self, known: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        tokens, values, likeliest, offsets = [], [], [], []
        for one in known:
            token_id = self._run.prompt_ids[self._prompt][0] if one is None else one.token_id
            # The first token of a prompt has no log-probability.
            tokens.append(self._first() if one is None else one.token)
            values.append(None if one is None else one.logprob)
            likeliest.append(None if one is None else self._likeliest(one))
            length = self._length(tokens[-1], token_id)
            offsets.append(self._offset)
            self._offset += length
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": offsets}

    def _length(self, text: str, token_id: int) -> int:
        """Number of characters that a token adds to the text; one that spans several tokens counts with the last."""
        data = self._run.tokenizer.token_bytes(token_id)
        try:
            data.decode()
        except UnicodeDecodeError:
            return len(self._characters.decode(data))
        # Bytes before this token that form no character are a replacement character in the text.
        self._offset += len(self._characters.decode(b"", final=True))
        self._characters.reset()
        return len(text)

    def _first(self) -> str:
        return self._run.tokenizer.decode([self._run.prompt_ids[self._prompt][0]])

    def _likeliest(self, one: TokenLogprob) -> dict[str, float]:
        logprobs: dict[str, float] = {}
        # Of tokens with the same text, such as parts of characters, the most likely one counts.
        for other in (*one.top[: self._wanted], one) if self._wanted else ():
            logprobs.setdefault(other.token, other.logprob)
        return logprobs


async def _pieces(run: Run) -> AsyncGenerator[tuple[int, Piece], None]:
    """Tokens as they come, held back until requested log-probabilities of their prompt are known."""
    held: dict[int, list[Piece]] = {}
    async with aclosing(run.read()) as pieces:
        async for prompt, piece in pieces:
            held.setdefault(prompt, []).append(piece)
            if not piece.answer.scoring:
                for one in held.pop(prompt):
                    yield prompt, one


async def complete(run: Run, body: CompletionRequest) -> CompletionObject:
    """The response, once it is finished; choices are in the order of the prompts."""
    n = run.request.params.n
    texts = [_Text(run, i // n) for i in range(len(run.request.prompts) * n)]
    choices: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(len(texts))]
    async with aclosing(_pieces(run)) as pieces:
        async for prompt, piece in pieces:
            choice = choices[prompt * n + piece.choice]
            text, logprobs = await texts[choice["index"]].push(piece)
            choice["text"] += text
            choice["finish_reason"] = piece.finish_reason
            if run.request.token_ids:
                choice.setdefault("prompt_token_ids", run.prompt_ids[prompt])
                choice.setdefault("token_ids", []).extend(_ids(piece))
            if logprobs is not None:
                kept = choice["logprobs"] = choice["logprobs"] or {name: [] for name in logprobs}
                for name, values in logprobs.items():
                    kept[name] += values
    for choice in choices:
        choice["prompt_logprobs"] = await run.prompt_logprobs(choice["index"] // n)
    head = {"id": run.id, "created": run.created, "model": run.model, "system_fingerprint": run.fingerprint}
    return CompletionObject.model_validate({**head, "choices": choices, "usage": run.usage()})


async def stream(run: Run, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """The response as events: a delta per token, finish reasons, and the usage if requested."""
    n = run.request.params.n
    texts = [_Text(run, i // n) for i in range(len(run.request.prompts) * n)]
    include_usage = body.wants_usage
    head = {
        "id": run.id,
        "object": "text_completion",
        "created": run.created,
        "model": run.model,
        "system_fingerprint": run.fingerprint,
    }
    no_usage = {"usage": None} if include_usage else {}
    begun: set[int] = set()
    async with aclosing(_pieces(run)) as pieces:
        async for prompt, piece in pieces:
            index = prompt * n + piece.choice
            text, logprobs = await texts[index].push(piece)
            finish = piece.finish_reason
            if text or finish or logprobs or run.request.token_ids:
                choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
                if run.request.token_ids:
                    choice["token_ids"] = _ids(piece)
                    choice["prompt_token_ids"] = None if index in begun else run.prompt_ids[prompt]
                    begun.add(index)
                usage = {"usage": run.usage()} if body.wants_usage_of_chunks else no_usage
                yield event({**head, "choices": [choice], **usage})
        if include_usage:
            yield event({**head, "choices": [], "usage": run.usage()})
    yield DONE


def _ids(piece: Piece) -> list[int]:
    return [] if piece.token_id is None else [piece.token_id]
