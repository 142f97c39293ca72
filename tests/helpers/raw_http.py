"""HTTP spoken over a bare socket: responses as they arrive, refused and closed connections, slow senders."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read status, headers and body of a response of any length."""
    # Unbuffered: a buffer would consume the start of the next response.
    with connection.makefile("rb", buffering=0) as file:
        status = int(file.readline().split()[1])
        headers = {}
        for line in iter(file.readline, b"\r\n"):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = b""
        while len(body) < int(headers["content-length"]) and (
            piece := file.read(int(headers["content-length"]) - len(body))
        ):
            body += piece
        return status, headers, body


def refusal(connection: socket.socket) -> tuple[int, str]:
    """Read status and code of an error after which the connection is closed."""
    status, headers, body = response(connection)
    assert headers["connection"] == "close" and headers["content-type"] == "application/json"
    [error] = json.loads(body).values()
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert is_closed(connection)
    return status, error["code"]


def is_closed(connection: socket.socket) -> bool:
    """Wait until the other side closes the connection; return whether it does."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@contextmanager
def dripping(connection: socket.socket, piece: bytes, pause: float = 0.05) -> Iterator[None]:
    """Send ``piece`` repeatedly while the block runs."""
    over = threading.Event()

    def drip() -> None:
        while not over.wait(pause):
            try:
                connection.sendall(piece)
            except OSError:
                return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
