"""Bodies on their way in: received within their time, size and memory, before they take one of the places of work."""

from __future__ import annotations

import asyncio
import math

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from aria.serve.errors import ApiError
from aria.serve.inflate import inflated, is_compressed
from aria.serve.json_reader import PIECE, JsonReader
from aria.serve.settings import ServerSettings
from aria.serve.streaming import ClientGoneError
from aria.serve.traffic import Work

STALL_SECONDS = 30.0
"""Without a byte of a body, before it is given up."""


async def receive_json(headers: Headers, receive: Receive, settings: ServerSettings, work: Work) -> JsonReader:
    """The body of a request, received and not yet parsed. Its memory is held by the work.

    Raises:
        ApiError: 400, 408, 413, 415 or 503; it is no JSON, does not come in time, is too large, or there is no memory.
        ClientGoneError: the client left in its middle.
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
            raise ClientGoneError
        body, more = memoryview(message.get("body", b"")), message.get("more_body", False)
        for start in range(0, len(body), PIECE):
            reader.feed(bytes(body[start : start + PIECE]))
            await work.hold(reader.nbytes)
            # Others want their turn between two pieces.
            await asyncio.sleep(0)
    await work.hold(reader.parsed_nbytes)
    return reader


def _check_type(headers: Headers) -> None:
    """Refuse a body that is not announced as JSON: pages of any origin may have a browser send others."""
    kind = headers.get("content-type", "none")
    essence = kind.partition(";")[0].strip().lower()
    if essence != "application/json" and not (essence.startswith("application/") and essence.endswith("+json")):
        message = f"the content type is {kind[:100]}; expected application/json"
        raise ApiError(415, message, code="unsupported_media_type")


def _timed(receive: Receive, seconds: float) -> Receive:
    """``receive`` that gives up a body which stops, or which is not complete in time."""
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
            said = "stopped in the middle" if rest == STALL_SECONDS else late
            raise ApiError(408, f"the body {said}", code="body_timeout") from None

    return timed


def _measured(receive: Receive, most: int) -> Receive:
    """``receive`` that ends at a body's largest size in bytes."""
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
