"""Server-sent events, and work that ends when its client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from aria.serve.errors import ApiError, unexpected
from aria.serve.traffic import current_work

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled as soon as the client has closed the connection.

    Raises:
        ClientGoneError: the client went first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
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
    """A response of server-sent events, which end as soon as the client is gone.

    Starlette's own learns of that only when it sends, which may be long after.

    Args:
        events: each is sent as it comes.
        close: called at the end, also if no event was ever asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]):
        # The second header asks nginx to pass events on one by one.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def end(error: Exception | None = None) -> None:
            # The status is out already: what went wrong comes as the last event.
            last = b"" if error is None else _last(error, scope["state"]["exchange"].request_id)
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
            work = current_work()
            if work is None or not work.over or task.done() or not started:
                raise
            await _cancel(task)
            await end(work.reason)
        finally:
            await _cancel(task, gone)
            await self._close()


def _last(error: Exception, request_id: str) -> bytes:
    if not isinstance(error, ApiError):
        logger.error("request %s failed in the middle of its stream", request_id, exc_info=error)
        error = unexpected(request_id)
    return event(error.body())


def event(data: Any, name: str | None = None) -> bytes:
    """One event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")


DONE = b"data: [DONE]\n\n"
