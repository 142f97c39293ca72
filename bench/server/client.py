"""A minimal client of the server: a POST over asyncio sockets, and the times of its tokens.

A full HTTP client would cost more than what is measured. As a script, ``python -m bench.server.client HOST PORT <
bodies.jsonl`` sends all requests at once and prints the times.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

TEXT = re.compile(rb'"content":"[^"]')
"""Matches a chunk with text."""


@dataclass
class Reply:
    """A response."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    first: float = 0.0
    """Seconds from the request to the first text."""
    last: float = 0.0
    """Seconds from the request to the end."""
    error: str | None = None


@asynccontextmanager
async def _post(host: str, port: int, path: str, body: Mapping[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        yield reader
    finally:
        writer.close()


async def ask(host: str, port: int, body: Mapping[str, Any], *, leave_after: int | None = None) -> Reply:
    """Send one chat request.

    Args:
        host: Host of the server.
        port: Port of the server.
        body: Body for ``/v1/chat/completions``, streamed or not; a stream should include its usage.
        leave_after: Disconnect after this many lines of the stream.
    """
    began = time.perf_counter()
    reply = Reply()
    async with _post(host, port, "/v1/chat/completions", body) as reader:
        reply.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if not body.get("stream"):
            _read_complete(reply, json.loads(await reader.read()))
        else:
            lines = 0
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    _read_chunk(reply, line[6:], began)
                    lines += 1
                if leave_after is not None and lines >= leave_after:
                    break
    reply.last = time.perf_counter() - began
    return reply


def _read_complete(reply: Reply, data: Mapping[str, Any]) -> None:
    if "error" in data:
        reply.error = data["error"]["message"]
        return
    [choice] = data["choices"]
    reply.text, reply.finish_reason = choice["message"]["content"], choice["finish_reason"]
    reply.tokens = data["usage"]["completion_tokens"]


def _read_chunk(reply: Reply, data: bytes, began: float) -> None:
    if data.startswith(b"[DONE]"):
        return
    event = json.loads(data)
    if "error" in event:
        reply.error = event["error"]["message"]
        return
    if event.get("usage"):
        reply.tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        if text := choice["delta"].get("content"):
            reply.first = reply.first or time.perf_counter() - began
            reply.text += text
        reply.finish_reason = choice["finish_reason"] or reply.finish_reason


async def time_stream(host: str, port: int, body: Mapping[str, Any]) -> Reply:
    """Time a stream and read its usage, without parsing its text, to leave the CPU to the server."""
    began = time.perf_counter()
    reply = Reply()
    async with _post(host, port, "/v1/chat/completions", body) as reader:
        reply.status = int((await reader.readline()).split()[1])
        end = b""
        while data := await reader.read(1 << 16):
            if not reply.first and TEXT.search(data):
                reply.first = time.perf_counter() - began
            end = (end + data)[-4096:]
    reply.last = time.perf_counter() - began
    if counted := re.search(rb'"completion_tokens": ?(\d+)', end):
        reply.tokens = int(counted[1])
    else:
        reply.error = end.decode(errors="replace")
    return reply


async def together(host: str, port: int, bodies: list[Mapping[str, Any]]) -> tuple[float, list[Reply]]:
    """Run all streams at once; return total seconds and the replies."""
    began = time.perf_counter()
    replies = await asyncio.gather(*(time_stream(host, port, body) for body in bodies))
    return time.perf_counter() - began, replies


def main() -> None:
    """Read bodies of streams from standard input, send them at once, and print seconds and replies."""
    bodies = [json.loads(line) for line in sys.stdin]
    seconds, replies = asyncio.run(together(sys.argv[1], int(sys.argv[2]), bodies))
    print(json.dumps({"seconds": seconds, "replies": [asdict(reply) for reply in replies]}))


if __name__ == "__main__":
    main()
