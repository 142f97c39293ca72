"""Responses to a fetch: a body within the limit, as zlib inflates it, or a ValueError; redirects only lead to public
addresses."""

from __future__ import annotations

import gzip
import ipaddress
import socket
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from aria.media import fetch as fetching
from aria.media.limits import MediaSettings

LIMIT = 1 << 20
SETTINGS = MediaSettings(max_redirects=3, total_timeout=5.0, read_timeout=2.0)
MEMORY = 64 << 20
WORDS = (
    *("HTTP/1.1 200 OK\r\n", "HTTP/1.1 302 Found\r\n", "Location: ", "Content-Length: ", "Content-Encoding: gzip\r\n"),
    *(
        "Content-Encoding: deflate\r\n",
        "Transfer-Encoding: chunked\r\n",
        "\r\n\r\n",
        "0\r\n\r\n",
        "http://",
        "https://",
    ),
    *("http://127.0.0.1/", "http://[::1]/", "//10.0.0.1/", "\x1f\x8b\x08", "br", "--next--"),
)
NEXT = b"--next--"
"""Between the answers of several connections."""


def fuzz(data: bytes) -> None:
    answers = iter(data.split(NEXT))

    def connect(family: Any, address: Any, clock: Any, timeout: Any) -> socket.socket:
        assert ipaddress.ip_address(address[0]).is_global, f"a connection to {address[0]}"
        ours, theirs = socket.socketpair()
        theirs.settimeout(1.0)
        theirs.sendall(next(answers, b""))
        theirs.shutdown(socket.SHUT_WR)
        opened.append(theirs)
        return ours

    opened: list[socket.socket] = []
    held: list[int] = []
    try:
        with mock.patch.object(fetching, "_connect", connect), mock.patch.object(socket, "getaddrinfo", _resolve):
            body = fetching.fetch("http://example.org/a", LIMIT, SETTINGS, held.append)
    except ValueError as error:
        assert len(str(error)) < 3000, "a message as long as the answer"
        return
    finally:
        for connection in opened:
            connection.close()
    assert len(body) <= min(LIMIT, sum(held)), f"{len(body)} bytes came, {held} were counted"


def _resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
    """Names are somewhere public; numbers are what they say."""
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        host = "93.184.216.34"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return [(family, socket.SOCK_STREAM, 0, "", (host, port))]


def seeds() -> Iterator[bytes]:
    zeros = bytes(3000)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n"
    yield head % 5 + b"\r\nhello"
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    for coding, body in (
        (b"gzip", gzip.compress(zeros, mtime=0) * 2),
        (b"deflate", zlib.compress(zeros)),
        (b"deflate", zlib.compress(zeros)[2:-4]),
        (b"gzip, deflate", zlib.compress(gzip.compress(zeros, mtime=0))),
    ):
        yield head % len(body) + b"Content-Encoding: " + coding + b"\r\n\r\n" + body
    for place in (b"/b", b"http://127.0.0.1/", b"https://[::1]/", b"http://other.example/\xe9"):
        found = b"HTTP/1.1 302 Found\r\nLocation: " + place + b"\r\nContent-Length: 0\r\n\r\n"
        yield found + NEXT + head % 2 + b"\r\nhi"
