"""All attackers at once: slow clients, silent ones, ones that disconnect, hostile media, noise.

    python attackers.py PORT SECONDS SEED [NAME ...]

attacks a server on this machine, by all methods of :class:`Attack` or those named, and prints a line of JSON: how often
each status came, by attacker, and media that were answered with an error of the server's other than 503. Status 0 is a
connection that was ended, -1 one that the attacker left.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from tests.hostile.bad_drawings import nested_forms
from tests.hostile.bad_images import tiny_webp
from tests.hostile.bad_media import catalog, zeros
from tests.hostile.probe import medium_part
from tests.hostile.server import CHAT, SOURCES

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(port: int, chance: random.Random) -> AsyncIterator[Streams]:
    """A connection from one of the attackers' addresses, aborted without a proper close."""
    source = (chance.choice(SOURCES), 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=source)
    try:
        yield reader, writer
    finally:
        if chance.randrange(2):
            writer.transport.abort()
        writer.close()


def head(size: int, *lines: str, path: str = CHAT) -> bytes:
    kind = "Content-Type: application/json"
    fields = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", kind, f"Content-Length: {size}", *lines]
    return "\r\n".join([*fields, "", ""]).encode()


def body(kind: str, data: bytes, times: int = 1, **fields: object) -> bytes:
    content = [medium_part(kind, base64.b64encode(data).decode())] * times
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}).encode()


async def status_of(reader: asyncio.StreamReader, seconds: float = 200.0) -> int:
    """The status of the response; 0: the connection ended."""
    try:
        line = await asyncio.wait_for(reader.readline(), seconds)
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0


class Attack:
    """Some hundred attackers of all kinds, until a time.

    Args:
        port: of the server on this machine.
        seconds: how long.
        seed: of everything that is drawn.
        names: of the attackers; none: all.

    Attributes:
        statuses: how often each status came, by attacker.
        faults: media that were answered with an error of the server's other than 503.
    """

    def __init__(self, port: int, seconds: float, seed: int = 0, names: Sequence[str] = ()):
        self.port, self.names = port, names
        self.statuses: dict[str, Counter[int]] = {}
        self.faults: list[str] = []
        self._end = time.monotonic() + seconds
        self._chance = random.Random(seed)
        self._media = [medium for medium in catalog().values() if not medium.heavy]
        self._long = body("document", nested_forms(self._chance, 9, 10))

    async def run(self) -> None:
        """Run the attack."""
        crowd: dict[Callable[[], Awaitable[int]], int] = {
            self.idle: 200, self.slow_headers: 60, self.slow_body: 60, self.stalled_body: 30, self.leaver: 12,
            self.bomb: 8, self.noise: 6, self.outsider: 4, self.large_head: 4, self.values: 1, self.slow_reader: 6,
            self.compressed: 1,
        }  # fmt: skip
        chosen = [one for one in crowd if not self.names or one.__name__ in self.names]
        await asyncio.gather(*(self._again(one) for one in chosen for _ in range(crowd[one])))

    async def _again(self, once: Callable[[], Awaitable[int]]) -> None:
        seen = self.statuses.setdefault(once.__name__, Counter())
        while (left := self._end - time.monotonic()) > 0:
            try:
                seen[await asyncio.wait_for(once(), left)] += 1
            except TimeoutError:
                return
            except OSError:
                seen[0] += 1
                await asyncio.sleep(0.2)

    async def idle(self) -> int:
        """Sends nothing."""
        async with connected(self.port, self._chance) as (reader, _):
            return await status_of(reader)

    async def slow_headers(self) -> int:
        """One header per second, endlessly."""
        async with connected(self.port, self._chance) as (reader, writer):
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
            answer = asyncio.ensure_future(status_of(reader))
            while not answer.done():
                writer.write(b"X-%d: %s\r\n" % (self._chance.randrange(10**6), b"a" * self._chance.choice((1, 1000))))
                await writer.drain()
                await asyncio.wait([answer], timeout=1.0)
            return answer.result()

    async def slow_body(self) -> int:
        """One byte of the body per second."""
        async with connected(self.port, self._chance) as (reader, writer):
            writer.write(head(200_000))
            answer = asyncio.ensure_future(status_of(reader))
            while not answer.done():
                writer.write(b" ")
                await writer.drain()
                await asyncio.wait([answer], timeout=1.0)
            return answer.result()

    async def stalled_body(self) -> int:
        """Half of a large body, then nothing."""
        async with connected(self.port, self._chance) as (reader, writer):
            writer.write(head(3_000_000) + b" " * 1_500_000)
            return await status_of(reader)

    async def leaver(self) -> int:
        """Disconnects at various points of a request."""
        data = self._chance.choice((self._long, body("image", tiny_webp(9000, 9000 - self._chance.randrange(999)))))
        words = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": True}).encode()
        data = self._chance.choice((data, words))
        whole = head(len(data)) + data
        async with connected(self.port, self._chance) as (reader, writer):
            match self._chance.randrange(5):
                case 0:
                    writer.write(whole[: self._chance.randrange(200)])
                case 1:
                    writer.write(whole[: self._chance.randrange(len(whole))])
                case 2:
                    writer.write(whole)
                case 3:
                    writer.write(whole)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(
                            reader.read(self._chance.choice((1, 200, 400))), self._chance.random() * 3
                        )
                case _:
                    writer.write(whole)
                    await asyncio.sleep(self._chance.random() * 3)
            await asyncio.wait_for(writer.drain(), 5)
        return -1

    async def bomb(self) -> int:
        """A hostile media file."""
        medium = self._chance.choice(self._media)
        seed = self._chance.randrange(1000)
        made = medium.bytes(seed)
        data = body(medium.kind, made, self._chance.choice((1, 1, 3)) if len(made) < 10**6 else 1)
        async with connected(self.port, self._chance) as (reader, writer):
            writer.write(head(len(data)) + data)
            await writer.drain()
            status = await status_of(reader)
        if status >= 500 and status != 503:  # 503: memory or workers are short, come again
            self.faults.append(f"{status} {medium.name} {seed}")
        return status

    async def noise(self) -> int:
        """Invalid requests, or several in one."""
        chance = self._chance
        hello = head(2) + b"{}"
        pieces = [
            lambda: chance.randbytes(3000),
            lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(300),
            lambda: b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + chance.randbytes(500),
            lambda: hello * 50,
            lambda: head(2, "Transfer-Encoding: chunked") + b"0\r\n\r\n" + hello,
            lambda: head(2, "Content-Length: 3") + b"{}",
            lambda: head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"ffffffffffffffff\r\n",
            lambda: head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"1\r\n \r\n" * 50_000,
            lambda: head(0).replace(b"Content-Length: 0", b"Content-Length: -1") + b"{}",
            lambda: b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
            lambda: b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 500,
            lambda: b"GET /health HTTP/9.9\r\nHost: \0\r\nX: \xff\r\n y\r\n\r\n",
            lambda: head(5, "Expect: 100-continue"),
            lambda: head(9, "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
        ]
        async with connected(self.port, chance) as (reader, writer):
            writer.write(chance.choice(pieces)())
            await writer.drain()
            return await status_of(reader, 5)

    async def outsider(self) -> int:
        """A different key each time, and a forged address."""
        chance = self._chance
        claimed = ".".join(str(chance.randrange(256)) for _ in range(4))
        data = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}).encode()
        key = chance.randbytes(chance.choice((8, 3000))).hex()
        fields = [f"Authorization: Bearer {key}", f"X-Forwarded-For: {claimed}"]
        async with connected(self.port, chance) as (reader, writer):
            writer.write(head(len(data), *fields, f"X-Request-Id: {chance.randbytes(20).hex()}") + data)
            status = await status_of(reader)
        await asyncio.sleep(0.2)
        return status

    async def large_head(self) -> int:
        """Megabytes of headers."""
        async with connected(self.port, self._chance) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\n" + b"X-A: " + b"a" * 5_000_000)
            with contextlib.suppress(OSError):
                await asyncio.wait_for(writer.drain(), 10)
            return await status_of(reader)

    async def values(self) -> int:
        """JSON with hundreds of thousands of values, or as many levels."""
        floods = (b'{"messages": [' + b"{}," * 100_000, b"[" * 400_000, b'{"a":' * 100_000, b'"' + b"\\u0041" * 300_000)
        many = self._chance.choice(floods)
        status = await self._status(head(len(many)) + many)
        await asyncio.sleep(2)
        return status

    async def slow_reader(self) -> int:
        """A long stream that the client does not read."""
        fields = {"max_tokens": 500, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
        data = json.dumps({"messages": [{"role": "user", "content": "hello"}], **fields}).encode()
        return await self._status(head(len(data)) + data, stay=20)

    async def compressed(self) -> int:
        """A body that inflates beyond the limit."""
        packed = b"\x1f\x8b\x08" + bytes(6) + b"\x03" + zeros(300 << 20)[2:]
        status = await self._status(head(len(packed), "Content-Encoding: gzip") + packed)
        await asyncio.sleep(5)
        return status

    async def _status(self, request: bytes, stay: float = 0.0) -> int:
        """The status of what comes to a whole request; the connection stays for some seconds then."""
        async with connected(self.port, self._chance) as (reader, writer):
            writer.write(request)
            await writer.drain()
            status = await status_of(reader)
            await asyncio.sleep(stay)
            return status


def main() -> None:
    if hasattr(os, "nice"):
        os.nice(10)  # the server is measured, and not the work of making what it is sent
    attack = Attack(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    asyncio.run(attack.run())
    print(json.dumps({"statuses": attack.statuses, "faults": attack.faults}))


if __name__ == "__main__":
    main()
