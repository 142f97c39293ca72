"""Slow, idle, numerous or endless connections do not affect other clients."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack

import httpx2
import pytest

from aria.serve.connections import MAX_HEADERS, MAX_PIPELINED
from aria.serve.settings import ServerSettings
from tests.helpers.raw_http import HEAD, dripping, is_closed, refusal, response
from tests.helpers.serving import running, until

LONG = 60.0
"""Seconds that nothing here waits for."""
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


# Headers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "more"),
    [(b"G", b"E"), (b"GET / HTTP/1.1\r\nX-A: ", b"a"), (b"GET / HTTP/1.1\r\n", b"A: a\r\n"), (b"GET /", b"a")],
)
def test_a_slow_drip_does_not_extend_the_deadline_of_headers(begin: bytes, more: bytes) -> None:
    with running(ServerSettings(header_seconds=0.5)) as live:
        with live.connect(begin) as slow, dripping(slow, more):
            assert refusal(slow) in ((408, "header_timeout"), (400, "bad_http"))
        with live.connect(GET) as connection:
            assert response(connection)[0] == 200
            # Also for the second request on a connection.
            connection.sendall(begin)
            with dripping(connection, more):
                assert refusal(connection) in ((408, "header_timeout"), (400, "bad_http"))


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 500_000,
        b"GET / HTTP/1.1\r\n" + b"a" * 500_000,
        b"GET /" + b"a" * 500_000,
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A:a\r\n" * (MAX_HEADERS + 1) + b"\r\n",
    ],
    ids=["header", "unfinished", "name", "address", "whole-address", "many"],
)
def test_the_size_of_headers_is_limited(sent: bytes) -> None:
    with running(ServerSettings(max_header_bytes=4096)) as live:
        with live.connect(sent) as connection:
            assert refusal(connection) == (431, "headers_too_large")
        until(lambda: not live.server.server_state.connections)


@pytest.mark.parametrize(
    "sent",
    [b"1;" + b"a" * 500_000, b"0\r\nX: " + b"a" * 500_000, b"0\r\n" + b"A:a\r\n" * (MAX_HEADERS + 1)],
    ids=["extension", "trailer", "trailers"],
)
def test_the_framing_of_bodies_is_limited(sent: bytes) -> None:
    with running(ServerSettings(max_header_bytes=4096)) as live:
        with live.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
            until(lambda: live.app.state.active_requests.active)
            connection.sendall(sent)
            assert is_closed(connection)
        until(lambda: not live.app.state.active_requests.active)


def test_bodies_in_tiny_chunks_are_accepted() -> None:
    body = json.dumps({"prompt": "a" * 20_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % one for one in body)
    with running(ServerSettings(max_header_bytes=4096)) as live:
        sent = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX-Trailer: a\r\n\r\n"
        with live.connect(sent) as connection:
            assert response(connection)[0] == 200


def test_large_headers_within_the_limit_are_accepted() -> None:
    with running() as live:
        headers = {f"X-{i}": "a" * 400 for i in range(70)}
        assert live.http.get("/version", headers=headers).status_code == 200
        error = httpx2.get(f"{live.address}/version", headers={"X-A": "a" * 40_000})
        assert error.status_code == 431


def test_pipelined_requests_are_answered_in_order_up_to_a_limit() -> None:
    with running() as live:
        asked = [b"GET /v1/models/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % i for i in range(MAX_PIPELINED)]
        with live.connect(b"".join(asked)) as connection:
            for i in range(MAX_PIPELINED):
                status, _, body = response(connection)
                assert status == 404 and f"'{i}'" in json.loads(body)["error"]["message"]
        with live.connect(GET * 1000) as connection:
            connection.settimeout(LONG)
            received = b""
            while piece := connection.recv(1 << 16):
                received += piece
            assert received.count(b"HTTP/1.1 ") <= MAX_PIPELINED


# Idle and numerous connections


@pytest.mark.slow
def test_a_connection_without_a_request_is_closed() -> None:
    with running(ServerSettings(idle_seconds=0.4, header_seconds=LONG)) as live:
        with live.connect() as fresh, live.connect(GET) as used:
            assert response(used)[0] == 200
            # Empty lines are not a request.
            with dripping(fresh, b"\r\n"), dripping(used, b"\r\n"):
                assert is_closed(fresh) and is_closed(used)
        # A busy connection is not idle.
        with live.connect(HEAD + b"Content-Length: 13\r\n\r\n") as slow:
            time.sleep(0.8)
            slow.sendall(b'{"prompt":""}')
            assert response(slow)[0] == 200


@pytest.mark.slow
def test_the_rest_of_a_body_is_not_awaited_after_the_response() -> None:
    with running(ServerSettings(header_seconds=0.4, idle_seconds=LONG, body_seconds=LONG)) as live:
        sent = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        with live.connect(sent) as connection:
            assert response(connection)[0] == 404
            with dripping(connection, b"a"):
                assert is_closed(connection)
        # A new request keeps the connection open.
        with live.connect(sent + bytes(999_999)) as connection:
            assert response(connection)[0] == 404
            connection.sendall(b"a" + GET)
            assert response(connection)[0] == 200


def test_the_longest_idle_connection_is_closed_for_a_new_one() -> None:
    with (
        running(ServerSettings(max_connections=3, idle_seconds=LONG, header_seconds=LONG)) as live,
        ExitStack() as stack,
    ):
        first, second = (stack.enter_context(live.connect(GET)) for _ in range(2))
        assert response(first)[0] == response(second)[0] == 200
        half = stack.enter_context(live.connect(b"GET / HTTP/1.1\r\n"))
        first.sendall(GET)
        assert response(first)[0] == 200
        for closed in (second, half, first):
            new = stack.enter_context(live.connect(GET))
            assert response(new)[0] == 200
            assert is_closed(closed)
        assert len(live.server.server_state.connections) == 3


def test_the_number_of_connections_in_use_is_limited() -> None:
    with running(ServerSettings(max_connections=3, body_seconds=LONG)) as live, ExitStack() as stack:
        busy = [stack.enter_context(live.connect(HEAD + b"Content-Length: 13\r\n\r\n")) for _ in range(3)]
        until(lambda: live.app.state.active_requests.active == 3)
        with live.connect(GET) as refused:
            status, headers, _ = response(refused)
            assert status == 503 and int(headers["retry-after"]) > 0 and is_closed(refused)
        busy[0].sendall(b'{"prompt":""}')
        assert response(busy[0])[0] == 200
        with live.connect(GET) as new:
            assert response(new)[0] == 200


def test_the_number_of_connections_per_address_is_limited() -> None:
    settings = ServerSettings(max_connections_per_address=2, body_seconds=LONG)
    with running(settings) as live, ExitStack() as stack:
        busy = [stack.enter_context(live.connect(HEAD + b"Content-Length: 13\r\n\r\n")) for _ in range(2)]
        until(lambda: live.app.state.active_requests.active == 2)
        with live.connect(GET) as refused:
            assert response(refused)[0] == 503
        if other := from_another_address(live.port):
            with other:
                other.sendall(GET)
                assert response(other)[0] == 200
        for one in busy:
            one.sendall(b'{"prompt":""}')
            assert response(one)[0] == 200
        with live.connect(GET) as new:
            assert response(new)[0] == 200
    # Clients behind a proxy have its address.
    settings = ServerSettings(max_connections_per_address=2, body_seconds=LONG, trusted_proxies=("127.0.0.0/8",))
    with running(settings) as live, ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(live.connect(HEAD + b"Content-Length: 13\r\n\r\n"))
        until(lambda: live.app.state.active_requests.active == 4)


def from_another_address(port: int) -> socket.socket | None:
    """A connection from another address of this machine, if it has one."""
    try:
        return socket.create_connection(("127.0.0.1", port), timeout=60, source_address=("127.0.0.2", 0))
    except OSError:
        return None


def test_a_response_that_is_not_read_is_given_up() -> None:
    with running(ServerSettings(write_seconds=0.4, idle_seconds=0.4)) as live:
        # Data that the kernel buffers does not count.
        live.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        large = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        small = GET
        for asked in (large, small):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", live.port))
            with connection:
                until(lambda: live.server.server_state.connections)
                for _ in range(MAX_PIPELINED if asked is large else 1):
                    connection.sendall(asked)
                until(lambda: not live.server.server_state.connections)
        assert live.http.get("/version").status_code == 200
