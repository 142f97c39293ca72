"""Answers of ``/v1/completions``, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aria.engine import TokenLogprob
from aria.serve.protocol import CompletionRequest
from aria.serve.replies import Completion
from aria.serve.service import Run
from aria.serve.streaming import DONE, event
from aria.serve.turns import Delta, Turn


class _Text:
    """One choice; its log-probabilities tell where in the text each token begins."""

    def __init__(self, run: Run):
        self._turn = Turn(run.asked, run.tokenizer)
        self._offset = 0
        self._wanted = run.asked.params.logprobs is not None

    def push(self, piece: Any) -> tuple[str, dict[str, Any] | None, str | None]:
        """A token -> text, log-probabilities, and the reason to end."""
        delta: Delta = self._turn.push(piece)
        text = "".join(part for part in delta.parts if isinstance(part, str))
        return text, self._logprobs(delta.logprobs) if self._wanted else None, delta.finish_reason

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for one in tokens:
            offsets.append(self._offset)
            self._offset += len(one.token)
        return {
            "tokens": [one.token for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [
                {other.token: other.logprob for other in (*one.top, one)} if one.top else {} for one in tokens
            ],
            "text_offset": offsets,
        }


async def whole(run: Run, body: CompletionRequest) -> Completion:
    """The answers once they are finished, those to the first prompt first."""
    n = run.asked.params.n
    texts = [_Text(run) for _ in range(len(run.asked.prompts) * n)]
    choices: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(len(texts))]
    async with aclosing(run.read()) as pieces:
        async for prompt, piece in pieces:
            choice = choices[prompt * n + piece.choice]
            text, logprobs, choice["finish_reason"] = texts[choice["index"]].push(piece)
            choice["text"] += text
            if run.prompt_ids:
                choice.setdefault("prompt_token_ids", run.prompt_ids[prompt])
                choice.setdefault("token_ids", []).append(piece.token_id)
            if logprobs is not None:
                kept = choice["logprobs"] = choice["logprobs"] or {name: [] for name in logprobs}
                for name, values in logprobs.items():
                    kept[name] += values
    head = {"id": run.id, "created": run.created, "model": run.model, "system_fingerprint": run.fingerprint}
    return Completion.model_validate({**head, "choices": choices, "usage": run.usage()})


async def chunks(run: Run, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """The answers as events: what each token adds, why each ended, and the usage if that is asked for."""
    n = run.asked.params.n
    texts = [_Text(run) for _ in range(len(run.asked.prompts) * n)]
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
    async with aclosing(run.read()) as pieces:
        async for prompt, piece in pieces:
            index = prompt * n + piece.choice
            text, logprobs, finish = texts[index].push(piece)
            if text or finish or (logprobs and logprobs["tokens"]) or run.prompt_ids:
                choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
                if run.prompt_ids:
                    choice["token_ids"] = [piece.token_id]
                    choice["prompt_token_ids"] = None if index in begun else run.prompt_ids[prompt]
                    begun.add(index)
                usage = {"usage": run.usage()} if body.wants_usage_of_chunks else no_usage
                yield event({**head, "choices": [choice], **usage})
        if include_usage:
            yield event({**head, "choices": [], "usage": run.usage()})
    yield DONE
