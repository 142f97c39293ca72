"""`Connection`: uvicorn's HTTP connection with limits on time, size and number.

uvicorn by itself waits forever for the first request, for the rest of its headers and for the client to read the
response, and buffers whatever arrives until then.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from aria.serve.active_requests import client_of
from aria.serve.errors import ApiError, overloaded
from aria.serve.settings import ServerSettings

MAX_HEADERS = 128
"""Maximum number of headers of one request; each takes far more memory than its bytes."""
MAX_PIPELINED = 16
"""Maximum number of pipelined requests."""
LINGER_SECONDS = 5.0
"""How long input is read and dropped after a refusal. Closing at once would lose the response."""
_SLICE = 1 << 14
"""Bytes parsed at a time outside of bodies; the limit on unfinished headers is that much larger."""
_FRAMING = 8
"""Bytes of framing per byte of a chunked body, for the smallest chunks."""


class Connections:
    """The open connections of one server.

    Args:
        settings: Limits on connections.
        most: Maximum number of connections, if the process cannot have as many as the settings allow.
    """

    def __init__(self, settings: ServerSettings, most: int | None = None):
        self.settings = settings
        self._most = settings.max_connections if most is None else most
        self._open: set[Connection] = set()
        self._by_client: Counter[str] = Counter()
        # Connections without a complete request, in the order in which they began to wait for one.
        self._waiting: dict[Connection, None] = {}
        self._proxies = [ip_network(proxy, strict=False) for proxy in settings.trusted_proxies]

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> bool:
        """Add a connection; returns False if there are too many and all are in use."""
        most = self.settings.max_connections_per_address
        own = self._by_client[connection.peer]
        room = (own < most or self._is_proxy(connection) or self._close_waiting(connection.peer)) and (
            len(self._open) < self._most or self._close_waiting()
        )
        self._open.add(connection)
        self._by_client[connection.peer] += 1
        return room

    def remove(self, connection: Connection) -> None:
        """Remove a closed connection."""
        if connection in self._open:
            self._open.discard(connection)
            self._by_client[connection.peer] -= 1
            if not self._by_client[connection.peer]:
                del self._by_client[connection.peer]
        self._waiting.pop(connection, None)

    def set_waiting(self, connection: Connection, waits: bool) -> None:
        """Set whether a connection waits for a request or the rest of its headers."""
        self._waiting.pop(connection, None)
        if waits:
            self._waiting[connection] = None

    def _close_waiting(self, peer: str | None = None) -> bool:
        """Close the connection that has waited longest, of all or of those from one address."""
        oldest = next((one for one in self._waiting if peer in (None, one.peer)), None)
        if oldest is not None:
            del self._waiting[oldest]
            oldest.close(LINGER_SECONDS)
        return oldest is not None

    def _is_proxy(self, connection: Connection) -> bool:
        try:
            ip = ip_address(connection.client[0] if connection.client else "")
        except ValueError:
            return False
        return any(ip in network for network in self._proxies)


class Connection(HttpToolsProtocol):
    """A connection that closes itself

    - after ``idle_seconds`` without a request, also before the first;
    - if a request's headers take longer than ``header_seconds`` or are larger than ``max_header_bytes``;
    - if the client does not read its output for ``write_seconds``;
    - if the response is complete and the rest of the request's body does not arrive.

    Args:
        connections: All connections of the server.
        kwargs: Arguments from uvicorn.
    """

    def __init__(self, connections: Connections, **kwargs: Any):
        super().__init__(**kwargs)
        self.peer = ""
        self._all = connections
        self._settings = connections.settings
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._fault: ApiError | None = None
        self._refused = False
        self._message = False  # whether a request has begun and is incomplete
        self._headers_complete = True
        self._began = False
        self._header_count = self._header_bytes = 0
        self._body_bytes = self._other_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = client_of(self.client[0]) if self.client else ""
        if self._all.add(self):
            self._wait()
        else:
            self._refuse(overloaded("too many connections are open; try again later", wait=5))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arm(None)
        self.resume_writing()
        self._all.remove(self)

    def close(self, seconds: float) -> None:
        """Close it once the client has read all output, at the latest after some seconds."""
        self.transport.close()
        self._arm(self.transport.abort, seconds)

    def linger(self) -> None:
        """Close it, but first read and drop what the client is still sending."""
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._arm(self.transport.abort, LINGER_SECONDS)

    def close_answered(self) -> None:
        """Close it after a response."""
        if self._message:
            self.linger()
        else:
            self.transport.close()

    # Input

    def data_received(self, data: bytes) -> None:
        start = 0
        while start < len(data) and not self._refused and not self.transport.is_closing():
            inside = self._message and self._headers_complete
            end = len(data) if inside else start + _SLICE
            piece = data[start:end] if start or end < len(data) else data
            start, body_bytes, self._began = end, self._body_bytes, False
            super().data_received(piece)
            # If a request began inside this piece, the size of its headers so far is unknown.
            self._other_bytes = 0 if self._began else self._other_bytes + len(piece) - (self._body_bytes - body_bytes)
            if self._other_bytes > self._settings.max_header_bytes + _FRAMING * self._body_bytes:
                self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._message, self._headers_complete, self._began = True, False, True
        self._header_count = self._header_bytes = self._body_bytes = 0
        self._arm(self._late, self._settings.header_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._header_count > MAX_HEADERS or self._header_bytes + len(self.url) > self._settings.max_header_bytes:
            self._fail(self._too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) > self._settings.max_header_bytes:
            self._fail(self._too_large())
        self._headers_complete = True
        self._arm(None)
        self._all.set_waiting(self, False)
        super().on_headers_complete()
        self.cycle.transport = _Lingering(self)  # type: ignore[assignment]
        if len(self.pipeline) > MAX_PIPELINED:
            self._fail(ApiError(400, "too many requests were sent before the response to the first"))

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._message = False
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._wait()

    # Output

    def on_response_complete(self) -> None:
        if self._refused:
            self.flow.resume_reading()
            return
        super().on_response_complete()
        if self.transport.is_closing():
            self.close(self._settings.write_seconds)
        elif not self.cycle.response_complete or not self._headers_complete:
            return  # the response to another request
        elif self._message:
            self._arm(self.transport.abort, self._settings.header_seconds)
        else:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None and not math.isinf(self._settings.write_seconds):
            self._write_timer = self.loop.call_later(self._settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # Limits

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault or ApiError(400, "this is not a valid HTTP request", code="bad_http"))

    def _fail(self, error: ApiError) -> None:
        """Stop parsing: an exception in a callback of the parser leads to :meth:`send_400_response`."""
        self._fault = error
        raise error

    def _refuse(self, error: ApiError) -> None:
        """Respond with an error and close."""
        if self._refused:
            return
        self._refused = True
        self._all.set_waiting(self, False)
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or (self._message and self._headers_complete) or self.transport.is_closing():
            self.close(LINGER_SECONDS)  # the request has a response already, or gets one
            return
        body = json.dumps(error.body()).encode("ascii")
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(error.headers or {}),
            "Connection": "close",
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + lines.encode("ascii") + b"\r\n" + body)
        self.linger()

    def _late(self) -> None:
        if self.flow.read_paused:  # the server itself does not read
            self._arm(self._late, self._settings.header_seconds)
            return
        late = f"the headers took longer than {self._settings.header_seconds:g} s (--header-seconds)"
        self._refuse(ApiError(408, late, code="header_timeout"))

    def _too_large(self) -> ApiError:
        most = f"{self._settings.max_header_bytes:,} bytes (--max-header-bytes) or {MAX_HEADERS} lines"
        return ApiError(431, f"the request's headers are larger than {most}", code="headers_too_large")

    def _wait(self) -> None:
        """Wait for the next request."""
        self._all.set_waiting(self, True)
        self._arm(lambda: self.close(self._settings.write_seconds), self._settings.idle_seconds)

    def _arm(self, then: Callable[[], None] | None, seconds: float = math.inf) -> None:
        """Replace the timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if then is None or math.isinf(seconds) else self.loop.call_later(seconds, then)


class _Lingering:
    """The transport of a response, which may be complete before its request."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def close(self) -> None:
        self._connection.close_answered()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection.transport, name)
