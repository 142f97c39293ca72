"""`respond`: a request body to a response, without HTTP. Used by the routes and by `aria batch`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from aria.serve import chat, completions, generation_request, responses, responses_protocol
from aria.serve.errors import ApiError, from_validation, invalid_request, not_found
from aria.serve.media_progress import TaskWithProgress
from aria.serve.protocol import ChatRequest, CompletionRequest
from aria.serve.request_context import RequestContext
from aria.serve.responses_protocol import ResponsesRequest
from aria.serve.service import Run, Service
from aria.serve.streaming import EventStream


class Endpoint(NamedTuple):
    """An endpoint that generates text."""

    body: type[BaseModel]
    parse: Callable[..., generation_request.GenerationRequest]
    """Body and defaults -> generation request."""
    prefix: str
    """Prefix of response ids."""
    param: str
    """The field of the body that holds the prompt."""
    complete: Callable[..., Awaitable[BaseModel]]
    """A run -> the complete response."""
    stream: Callable[..., AsyncGenerator[bytes, None]]
    """A run -> server-sent events."""


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(
        ChatRequest, generation_request.chat, "chatcmpl-", "messages", chat.complete, chat.stream
    ),
    "/v1/completions": Endpoint(
        CompletionRequest, generation_request.completion, "cmpl-", "prompt", completions.complete, completions.stream
    ),
    "/v1/responses": Endpoint(
        ResponsesRequest, responses_protocol.read, "resp_", "input", responses.complete, responses.stream
    ),
}


async def respond(
    service: Service, path: str, body: Any, context: RequestContext | None = None
) -> BaseModel | EventStream:
    """Respond to a validated body, with a stream if it asks for one.

    Args:
        service: An engine and its settings.
        path: One of :data:`ENDPOINTS`.
        body: A body of the endpoint's model.
        context: Identifies the client, and receives token counts.

    Raises:
        ApiError: The request cannot be fulfilled.
    """
    endpoint = ENDPOINTS[path]

    def read() -> generation_request.GenerationRequest:
        try:
            return endpoint.parse(body, service.defaults)
        except ValueError as error:
            raise invalid_request(error) from error
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None

    request = await service.read(read)
    context = context or RequestContext()
    model = service.model(body.model)
    id = endpoint.prefix + (body.request_id or uuid.uuid4().hex).removeprefix(endpoint.prefix)
    start = service.start(request, id=id, model=model, param=endpoint.param, context=context)
    if isinstance(body, ChatRequest) and body.wants_progress:
        return await _with_progress(TaskWithProgress(start), body, id, model)
    run = await start
    if body.stream:
        return EventStream(endpoint.stream(run, body), run.aclose)
    return await endpoint.complete(run, body)


async def _with_progress(reading: TaskWithProgress[Run], body: ChatRequest, id: str, model: str) -> EventStream:
    """A stream that starts while the prompt's media are being read."""
    await reading.begin()

    async def events() -> AsyncGenerator[bytes, None]:
        async for progress in reading.progress():
            yield chat.progress_chunk(id, model, progress)
        async with aclosing(chat.stream(await reading.result(), body)) as stream:
            async for chunk in stream:
                yield chunk

    async def close() -> None:
        await reading.aclose()
        if (run := reading.finished) is not None:
            await run.aclose()

    return EventStream(events(), close)


async def answer(service: Service, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Answer a request as its route would, without HTTP. Cancelling this cancels the request.

    Args:
        service: An engine and its settings; keys, queue and body size are not checked here.
        path: One of :data:`ENDPOINTS`, such as ``/v1/chat/completions``.
        body: The decoded JSON body.

    Returns:
        HTTP status and body.

    Raises:
        Exception: An error that is not the fault of the body.
    """
    try:
        if path not in ENDPOINTS:
            raise not_found(path)
        if body.get("stream"):
            raise ApiError(400, "stream is not supported here; leave it out", param="stream")
        try:
            read = ENDPOINTS[path].body.model_validate(body)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False)) from error
        reply = await respond(service, path, read)
    except ApiError as error:
        return error.status, error.body()
    assert isinstance(reply, BaseModel), "streams were refused"
    return 200, reply.model_dump(mode="json", by_alias=True)
