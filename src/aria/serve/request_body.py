"""Request bodies, received within limits on time, size and memory before their requests start."""

from __future__ import annotations

import asyncio
import math

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from aria.serve.active_requests import ActiveRequest
from aria.serve.errors import ApiError
from aria.serve.inflate import inflated, is_compressed
from aria.serve.json_reader import PIECE, JsonReader
from aria.serve.settings import ServerSettings
from aria.serve.streaming import ClientDisconnectError

STALL_SECONDS = 30.0
"""Time without a byte after which a body is given up."""


async def receive_json(
    headers: Headers, receive: Receive, settings: ServerSettings, request: ActiveRequest
) -> JsonReader:
    """Receive the body of a request without parsing it. Its memory counts towards the request.

    Raises:
        ApiError: 400, 408, 413, 415 or 503: the body is not JSON, too slow or too large, or memory is short.
        ClientDisconnectError: The client disconnected before the end of the body.
    """
    _check_type(headers)
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > settings.max_body:
        raise _too_large(settings.max_body)
    receive = _measured(_timed(receive, settings.body_seconds), settings.max_body)
    if is_compressed(headers):
        receive = _measured(inflated(receive), settings.max_body)
    reader, more = JsonReader(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnectError
        body, more = memoryview(message.get("body", b"")), message.get("more_body", False)
        for start in range(0, len(body), PIECE):
            reader.feed(bytes(body[start : start + PIECE]))
            await request.hold(reader.nbytes)
            # Let other requests run between two pieces.
            await asyncio.sleep(0)
    await request.hold(reader.parsed_nbytes)
    return reader


def _check_type(headers: Headers) -> None:
    """Refuse bodies of other types than JSON, which browsers send for pages of any origin."""
    kind = headers.get("content-type", "none")
    essence = kind.partition(";")[0].strip().lower()
    if essence != "application/json" and not (essence.startswith("application/") and essence.endswith("+json")):
        message = f"the content type is {kind[:100]}; expected application/json"
        raise ApiError(415, message, code="unsupported_media_type")


def _timed(receive: Receive, seconds: float) -> Receive:
    """``receive`` with time limits on the whole body and on pauses within it."""
    end = math.inf

    async def timed() -> Message:
        nonlocal end
        now = asyncio.get_running_loop().time()
        if end == math.inf:
            end = now + seconds
        rest = min(end - now, STALL_SECONDS)
        try:
            async with asyncio.timeout(rest):
                return await receive()
        except TimeoutError:
            late = f"took longer than {seconds:g} s (--body-seconds)"
            problem = "stopped in the middle" if rest == STALL_SECONDS else late
            raise ApiError(408, f"the body {problem}", code="body_timeout") from None

    return timed


def _measured(receive: Receive, most: int) -> Receive:
    """``receive`` with a limit on the size of the body, in bytes."""
    taken = 0

    async def measured() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise _too_large(most)
        return message

    return measured


def _too_large(most: int) -> ApiError:
    message = f"the body is larger than the {most:,} bytes that this server takes"
    return ApiError(413, message, code="body_too_large")
