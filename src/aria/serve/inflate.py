"""Gzip request bodies, decompressed as they arrive."""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from aria.serve.errors import ApiError

PIECE = 1 << 16
"""Maximum size of one message: zeros expand a thousandfold, and other requests must run in between."""
_GZIP = 16 + zlib.MAX_WBITS
_ENCODINGS = {"gzip": True, "x-gzip": True, "identity": False, "": False}


def is_compressed(headers: Headers) -> bool:
    """Whether a body is compressed with gzip.

    Raises:
        ApiError: 415, it has another encoding.
    """
    encodings = [one.strip().lower() for value in headers.getlist("content-encoding") for one in value.split(",")]
    if unknown := [one for one in encodings if one not in _ENCODINGS]:
        raise _refused(f"the content encoding {unknown[0]!r:.40} is not supported; expected gzip or identity")
    compressed = sum(_ENCODINGS[one] for one in encodings)
    if compressed > 1:
        raise _refused("the body is compressed twice; compress it once")
    return bool(compressed)


def _refused(message: str) -> ApiError:
    headers = {"Accept-Encoding": "gzip, identity"}
    return ApiError(415, message, code="unsupported_content_encoding", headers=headers)


def inflated(receive: Receive) -> Receive:
    """``receive`` of the decompressed body, in messages of at most :data:`PIECE` bytes.

    It raises an :class:`ApiError`, 400, if the body is not gzip or is truncated.
    """
    stream = zlib.decompressobj(_GZIP)
    waiting, full, more, over = b"", False, True, False

    async def read() -> Message:
        nonlocal stream, waiting, full, more, over
        if over:
            return await receive()
        while more and not (waiting or full):
            message = await receive()
            if message["type"] != "http.request":
                return message
            waiting, more = message.get("body", b""), message.get("more_body", False)
        if stream.eof and waiting:  # a gzip file may have several members
            stream = zlib.decompressobj(_GZIP)
        try:
            piece = stream.decompress(waiting, PIECE)
        except zlib.error as error:
            raise ApiError(400, f"the body is not gzip: {error}", code="bad_gzip") from None
        waiting, full = (stream.unused_data, False) if stream.eof else (stream.unconsumed_tail, len(piece) == PIECE)
        over = not (waiting or full or more)
        if over and not stream.eof:
            raise ApiError(400, "the gzip body is truncated", code="bad_gzip")
        await asyncio.sleep(0)
        return {"type": "http.request", "body": piece, "more_body": not over}

    return read
