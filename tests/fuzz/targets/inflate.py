"""gzip bodies, however they are split into chunks: as Python inflates them, in pieces of bounded size."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Iterator
from functools import cache

from aria.serve.errors import ApiError
from aria.serve.inflate import PIECE, inflated
from tests.fuzz.draw import Draw

MEMORY = 64 << 20
MAX_BYTES = 16 << 20
"""Inflated; a body of more is left there."""
WORDS = ("\x1f\x8b\x08\0", "\x1f\x8b\x08\x08", "\x03\0\0\0\0\0\0\0\0\0")


@cache
def _runner() -> asyncio.Runner:
    return asyncio.Runner()


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    compresses, step = draw.flag(), 1 + draw.below(1 << 12)
    body = draw.rest()
    if compresses:
        # The size is in the input's hand, its content repeats.
        body = gzip.compress(body * (1 + step % 97), mtime=0) * (1 + step % 3)
    try:
        out = _runner().run(_inflate(body, step))
    except ApiError as error:
        assert error.status == 400
        assert not compresses, f"a good body is refused: {error}"
        return
    if out is None:
        return
    try:
        expected = gzip.decompress(body)
    except (OSError, EOFError, zlib.error):
        raise AssertionError("a body that Python does not take for gzip was taken") from None
    assert out == expected


async def _inflate(body: bytes, step: int) -> bytes | None:
    pieces = [body[start : start + step] for start in range(0, len(body), step)] or [b""]
    messages = iter(
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, 1)
    )

    async def receive() -> dict[str, object]:
        return next(messages, {"type": "http.disconnect"})

    read = inflated(receive)
    out = bytearray()
    while True:
        message = await read()
        assert message["type"] == "http.request", "it asked for more than the body"
        assert len(message["body"]) <= PIECE
        out += message["body"]
        if not message["more_body"]:
            return bytes(out)
        if len(out) > MAX_BYTES:
            return None


def seeds() -> Iterator[bytes]:
    yield b"\1\0\0hello"
    yield b"\0\0\7" + gzip.compress(b"hello", mtime=0)
    yield b"\0\0\3" + gzip.compress(bytes(100_000), mtime=0) * 2
    yield b"\0\1\0" + gzip.compress(b"", mtime=0)
