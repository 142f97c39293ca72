"""A local web server for tests of URLs, and host names that resolve as a test defines."""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Answer = tuple[int, Mapping[str, str], bytes]


@contextlib.contextmanager
def site(answer: Callable[[http.server.BaseHTTPRequestHandler], Answer | None]) -> Iterator[str]:
    """Run a server that answers GET with (status, headers, body), or lets the function write the response."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = answer(self)
            if given is None:
                return
            status, headers, body = given
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            # Clients may disconnect early.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Resolver:
    """Replaces ``socket.getaddrinfo``: each name has a list of answers, used in order; the last one repeats.

    Numeric addresses and unlisted names are resolved by the system.
    """

    def __init__(self, names: Mapping[str, Sequence[Sequence[str]]]):
        self._names = {name: list(answers) for name, answers in names.items()}
        self._system = socket.getaddrinfo
        self.asked: list[str] = []

    def __call__(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in self._names:
            return self._system(host, port, *args, **kwargs)
        self.asked.append(name)
        answers = self._names[name]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [_entry(address, port) for address in addresses]


def _entry(address: str, port: int) -> tuple[Any, ...]:
    if ipaddress.ip_address(address.partition("%")[0]).version == 6:
        return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)
