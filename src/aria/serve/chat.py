"""Responses of ``/v1/chat/completions``, complete and streamed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aria.media.progress import Progress
from aria.serve.choice_parser import ChoiceDelta, ChoiceParser, logprob_object
from aria.serve.protocol import ChatRequest
from aria.serve.response_models import ChatCompletion
from aria.serve.service import Run
from aria.serve.streaming import DONE, event
from aria.serve.tool_calls import Call


async def complete(run: Run, body: ChatRequest) -> ChatCompletion:
    """The response, once it is finished."""
    n = run.request.params.n
    turns = [ChoiceParser(run.request, run.tokenizer) for _ in range(n)]
    deltas: list[list[ChoiceDelta]] = [[] for _ in range(n)]
    tokens: list[list[int]] = [[] for _ in range(n)]
    async with aclosing(run.read()) as pieces:
        async for _, piece in pieces:
            if not turns[piece.choice].finished and piece.token_id is not None:
                tokens[piece.choice].append(piece.token_id)
            deltas[piece.choice].append(turns[piece.choice].push(piece))
            if all(turn.finished for turn in turns):
                break
    return ChatCompletion.model_validate(
        {
            "id": run.id,
            "created": run.created,
            "model": run.model,
            "system_fingerprint": run.fingerprint,
            "choices": [_choice(run, i, deltas[i], tokens[i]) for i in range(n)],
            "usage": run.usage(),
            "prompt_token_ids": run.prompt_ids[0] if run.request.token_ids else None,
            "prompt_logprobs": await run.prompt_logprobs(0),
        }
    )


def _choice(run: Run, index: int, deltas: list[ChoiceDelta], tokens: list[int]) -> dict[str, Any]:
    parts = [part for delta in deltas for part in delta.parts]
    text = "".join(part for part in parts if isinstance(part, str))
    calls = [_call(part) for part in parts if isinstance(part, Call)]
    logprobs = None
    if run.request.params.logprobs is not None:
        tokens_logprobs = [logprob_object(one, run.tokenizer) for delta in deltas for one in delta.logprobs]
        logprobs = {"content": tokens_logprobs, "refusal": None}
    finish = next(delta.finish_reason for delta in reversed(deltas) if delta.finish_reason is not None)
    message = {"content": text or None if calls else text, "tool_calls": calls or None}
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish,
        "token_ids": tokens if run.request.token_ids else None,
    }


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def stream(run: Run, body: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The response as events: the role, a delta per token, the finish reason, and the usage if requested."""
    n, include_usage = run.request.params.n, body.wants_usage
    turns = [ChoiceParser(run.request, run.tokenizer) for _ in range(n)]
    calls = [0] * n
    continuous = body.wants_usage_of_chunks
    no_usage = ',"usage":null' if include_usage else ""
    # Most chunks differ by one word of text, so only that is encoded.
    head = (
        f'data: {{"id":"{run.id}","object":"chat.completion.chunk","created":{run.created},'
        f'"model":{json.dumps(run.model)},"system_fingerprint":"{run.fingerprint}","choices":['
    )

    def usage() -> str:
        return f',"usage":{json.dumps(run.usage())}' if continuous else no_usage

    def chunk(
        index: int,
        delta: dict[str, Any],
        logprobs: Any = None,
        finish: str | None = None,
        more: str = "",
        **fields: Any,
    ) -> bytes:
        choice = {"delta": delta, "logprobs": logprobs, "finish_reason": finish, **fields}
        rest = json.dumps(choice, separators=(",", ":"))
        return f'{head}{{"index":{index},{rest[1:]}]{more}{usage()}}}\n\n'.encode("ascii")

    async with aclosing(run.read()) as pieces:
        prompt = f',"prompt_token_ids":{json.dumps(run.prompt_ids[0])}' if run.request.token_ids else ""
        for index in range(n):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None}, more="" if index else prompt)
        async for _, piece in pieces:
            index = piece.choice
            if run.request.token_ids and not turns[index].finished:
                yield chunk(index, {}, token_ids=[piece.token_id])
            delta = turns[index].push(piece)
            if len(delta.parts) == 1 and isinstance(delta.parts[0], str) and not delta.logprobs:
                text = f'{{"index":{index},"delta":{{"content":{json.dumps(delta.parts[0])}}}'
                yield f'{head}{text},"logprobs":null,"finish_reason":null}}]{usage()}}}\n\n'.encode("ascii")
            else:
                for made in _deltas(delta, calls, index):
                    yield chunk(index, made)
                if delta.logprobs:
                    text = "".join(part for part in delta.parts if isinstance(part, str))
                    tokens_logprobs = [logprob_object(one, run.tokenizer) for one in delta.logprobs]
                    yield chunk(index, {"content": text}, {"content": tokens_logprobs, "refusal": None})
            if delta.finish_reason is not None:
                yield chunk(index, {}, finish=delta.finish_reason)
            if all(turn.finished for turn in turns):
                break
        if include_usage:
            yield f'{head}],"usage":{json.dumps(run.usage())}}}\n\n'.encode("ascii")
    yield DONE


def progress_chunk(id: str, model: str, progress: Progress) -> bytes:
    """An event before the first chunk: how far the prompt's media have been read."""
    head = {"id": id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model, "choices": []}
    return event({**head, "progress": progress._asdict()})


def _deltas(delta: ChoiceDelta, calls: list[int], index: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for part in delta.parts:
        if isinstance(part, Call):
            made.append({"tool_calls": [{"index": calls[index], **_call(part)}]})
            calls[index] += 1
        elif not delta.logprobs:
            made.append({"content": part})
    return made
