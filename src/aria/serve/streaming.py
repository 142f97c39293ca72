"""Server-sent events, and cancellation when the client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from aria.serve.active_requests import current_request
from aria.serve.errors import ApiError, unexpected

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ClientDisconnectError(Exception):
    """The client closed its connection."""


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, and cancel it as soon as the client disconnects.

    Raises:
        ClientDisconnectError: The client disconnected before the work was done.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectError
        return task.result()
    finally:
        await _cancel(task, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events that stops as soon as the client disconnects.

    Starlette's StreamingResponse notices that only on its next send, which may be much later.

    Args:
        events: Encoded events, sent as they come.
        close: Called at the end, even if no event was consumed.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]):
        # The second header disables buffering in nginx.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def end(error: Exception | None = None) -> None:
            # The status has been sent already, so the error is the last event.
            last = b"" if error is None else _last(error, scope["state"]["context"].request_id)
            await send({"type": "http.response.body", "body": last, "more_body": False})

        async def answer() -> None:
            nonlocal started
            started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async with aclosing(self._events) as events:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:
                await end(error)
            else:
                await end()

        task, gone = asyncio.ensure_future(answer()), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        except asyncio.CancelledError:
            request = current_request()
            if request is None or not request.expired or task.done() or not started:
                raise
            await _cancel(task)
            await end(request.reason)
        finally:
            await _cancel(task, gone)
            await self._close()


def _last(error: Exception, request_id: str) -> bytes:
    if not isinstance(error, ApiError):
        logger.error("request %s failed while streaming", request_id, exc_info=error)
        error = unexpected(request_id)
    return event(error.body())


def event(data: Any, name: str | None = None) -> bytes:
    """Encode one event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")


DONE = b"data: [DONE]\n\n"
