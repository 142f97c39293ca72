"""`answer`: a body to an answer without a server: the routes use it, and so does `aria batch`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from aria.serve import bodies, chat, completions, responses, responses_body
from aria.serve.errors import ApiError, from_validation, invalid_request, not_found
from aria.serve.exchange import Exchange
from aria.serve.protocol import ChatRequest, CompletionRequest
from aria.serve.reading import Reading
from aria.serve.responses_body import ResponsesRequest
from aria.serve.service import Run, Service
from aria.serve.streaming import EventStream


class Route(NamedTuple):
    """One way to ask."""

    body: type[BaseModel]
    read: Callable[..., bodies.Asked]
    """Body and defaults -> what is asked."""
    prefix: str
    """Of ids."""
    param: str
    """The field of the body that prompts come from."""
    whole: Callable[..., Any]
    """A run -> the answer."""
    chunks: Callable[..., Any]
    """A run -> events."""


ROUTES = {
    "/v1/chat/completions": Route(ChatRequest, bodies.chat, "chatcmpl-", "messages", chat.whole, chat.chunks),
    "/v1/completions": Route(
        CompletionRequest, bodies.completion, "cmpl-", "prompt", completions.whole, completions.chunks
    ),
    "/v1/responses": Route(ResponsesRequest, responses_body.read, "resp_", "input", responses.whole, responses.chunks),
}


async def respond(service: Service, path: str, body: Any, exchange: Exchange | None = None) -> BaseModel | EventStream:
    """The answer to a body that was read; a stream if it asks for one. The exchange is who asked, and counts tokens.

    Raises:
        ApiError: the request cannot be answered.
    """
    route = ROUTES[path]

    def read() -> bodies.Asked:
        try:
            return route.read(body, service.defaults)
        except ValueError as error:
            raise invalid_request(error) from error
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None

    asked = await service.read(read)
    exchange = exchange or Exchange()
    model = service.model(body.model)
    id = route.prefix + (body.request_id or uuid.uuid4().hex).removeprefix(route.prefix)
    start = service.start(asked, id=id, model=model, param=route.param, exchange=exchange)
    if isinstance(body, ChatRequest) and body.wants_progress:
        return await _with_progress(Reading(start), body, id, model)
    run = await start
    if body.stream:
        return EventStream(route.chunks(run, body), run.aclose)
    return await route.whole(run, body)


async def _with_progress(reading: Reading[Run], body: ChatRequest, id: str, model: str) -> EventStream:
    """A stream that begins while the prompt's media are read."""
    await reading.begin()

    async def events() -> AsyncGenerator[bytes, None]:
        async for progress in reading.progress():
            yield chat.progress_chunk(id, model, progress)
        async with aclosing(chat.chunks(await reading.result(), body)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def close() -> None:
        await reading.aclose()
        if (run := reading.finished) is not None:
            await run.aclose()

    return EventStream(events(), close)


async def answer(service: Service, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The status and body that the route answers with. Cancelling this cancels the request.

    Args:
        service: an engine and its settings; keys, queue and size of bodies do not count here.
        path: such as ``/v1/chat/completions``; one of :data:`ROUTES`.
        body: JSON, read.

    Raises:
        Exception: whatever is no fault of the body.
    """
    try:
        if path not in ROUTES:
            raise not_found(path)
        if body.get("stream"):
            raise ApiError(400, "stream is not supported here; leave it out", param="stream")
        try:
            read = ROUTES[path].body.model_validate(body)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False)) from error
        reply = await respond(service, path, read)
    except ApiError as error:
        return error.status, error.body()
    assert isinstance(reply, BaseModel), "streams were refused"
    return 200, reply.model_dump(mode="json", by_alias=True)
