"""The least that speaks to the server: a POST over asyncio's own sockets, and when its tokens came.

A full HTTP client would cost more than what is measured. Run as a script it asks many things at once, in a process of
its own, and prints the times: ``python -m bench.server.client HOST PORT < bodies.jsonl``.
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
"""A chunk that has some."""


@dataclass
class Reply:
    """What came back."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    first: float = 0.0
    """Seconds from the request to its first text."""
    last: float = 0.0
    """Seconds from the request to its end."""
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
    """One chat.

    Args:
        body: of ``/v1/chat/completions``, streamed or not; a stream should include its usage.
        leave_after: close the connection after so many lines of the stream.
    """
    began = time.perf_counter()
    reply = Reply()
    async with _post(host, port, "/v1/chat/completions", body) as reader:
        reply.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if not body.get("stream"):
            said = json.loads(await reader.read())
            _whole(reply, said)
        else:
            lines = 0
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    _chunk(reply, line[6:], began)
                    lines += 1
                if leave_after is not None and lines >= leave_after:
                    break
    reply.last = time.perf_counter() - began
    return reply


def _whole(reply: Reply, said: Mapping[str, Any]) -> None:
    if "error" in said:
        reply.error = said["error"]["message"]
        return
    [choice] = said["choices"]
    reply.text, reply.finish_reason = choice["message"]["content"], choice["finish_reason"]
    reply.tokens = said["usage"]["completion_tokens"]


def _chunk(reply: Reply, data: bytes, began: float) -> None:
    if data.startswith(b"[DONE]"):
        return
    said = json.loads(data)
    if "error" in said:
        reply.error = said["error"]["message"]
        return
    if said.get("usage"):
        reply.tokens = said["usage"]["completion_tokens"]
    for choice in said["choices"]:
        if text := choice["delta"].get("content"):
            reply.first = reply.first or time.perf_counter() - began
            reply.text += text
        reply.finish_reason = choice["finish_reason"] or reply.finish_reason


async def time_stream(host: str, port: int, body: Mapping[str, Any]) -> Reply:
    """The times and the usage of a stream, whose text is not even looked at: the machine belongs to the server."""
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
    """Seconds for all of these streams at once, and for each."""
    began = time.perf_counter()
    replies = await asyncio.gather(*(time_stream(host, port, body) for body in bodies))
    return time.perf_counter() - began, replies


def main() -> None:
    """Bodies of streams from standard input, all at once; seconds and replies to standard output."""
    bodies = [json.loads(line) for line in sys.stdin]
    seconds, replies = asyncio.run(together(sys.argv[1], int(sys.argv[2]), bodies))
    print(json.dumps({"seconds": seconds, "replies": [asdict(reply) for reply in replies]}))


if __name__ == "__main__":
    main()
