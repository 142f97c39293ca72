"""nginx and Caddy before the server, with the configurations in docs: streams arrive as they are written, clients
cannot claim other addresses, and limits hold. Where a proxy is not installed its tests are skipped."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest

from aria.serve.settings import ServerSettings
from aria.serve.streaming import EventStream
from tests.helpers.serving import engine, idle, running, until

DOCS = Path(__file__).parents[2] / "docs"
NAME = "aria.example"
LARGE = 257 << 20


class Proxy(NamedTuple):
    address: str
    host: str
    """What clients call it."""
    port: int

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.address, verify=False, timeout=60, headers={"Host": self.host})

    def connection(self) -> http.client.HTTPConnection:
        if self.address.startswith("https"):
            context = ssl._create_unverified_context()
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) >= 1, f"the configuration has no {old!r}"
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def nginx(upstream: int, folder: Path) -> Iterator[Proxy]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={NAME}"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    port = free_port()
    (folder / "aria.conf").write_text(
        replaced(
            (DOCS / "nginx.conf").read_text(encoding="utf-8"),
            {
                "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
                "listen 80;": f"listen 127.0.0.1:{free_port()};",
                "127.0.0.1:8000": f"127.0.0.1:{upstream}",
                "/etc/ssl/aria.example.pem": str(certificate),
                "/etc/ssl/private/aria.example.key": str(key),
            },
        )
    )
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"daemon off; {user} pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} include {folder}/aria.conf; }}"
    )
    subprocess.run(["nginx", "-t", "-c", folder / "nginx.conf"], check=True, capture_output=True)
    with started(["nginx", "-c", str(folder / "nginx.conf")], port):
        yield Proxy(f"https://127.0.0.1:{port}", NAME, port)


@contextlib.contextmanager
def caddy(upstream: int, folder: Path) -> Iterator[Proxy]:
    port = free_port()
    (folder / "Caddyfile").write_text(
        replaced(
            (DOCS / "Caddyfile").read_text(encoding="utf-8"),
            {
                f"\n{NAME} {{": f"\nhttp://{NAME}:{port} {{\n\tbind 127.0.0.1",
                "{\n\tservers {": "{\n\tadmin off\n\tservers {",
                "127.0.0.1:8000": f"127.0.0.1:{upstream}",
            },
        )
    )
    homes = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    command = ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    with started(command, port, {**os.environ, **homes}):
        yield Proxy(f"http://127.0.0.1:{port}", f"{NAME}:{port}", port)


@contextlib.contextmanager
def started(command: list[str], port: int, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Runs a program until the block ends; the block starts once it listens."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until(lambda: process.poll() is not None or listens(port), 30)
            assert process.poll() is None, process.stderr.read()
            yield
        finally:
            process.terminate()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


PROXIES = {"nginx": nginx, "caddy": caddy}


@pytest.fixture(params=PROXIES)
def before(request, tmp_path):
    """Starts the proxy before a port."""
    if shutil.which(request.param) is None or (request.param == "nginx" and shutil.which("openssl") is None):
        pytest.skip(f"{request.param} is not installed")
    with contextlib.ExitStack() as stack:
        yield lambda port: stack.enter_context(PROXIES[request.param](port, tmp_path))


class Upstream:
    """A server that records the headers of its requests, and responds when it may."""

    def __init__(self) -> None:
        self.heads: list[dict[str, str]] = []
        self.answers = threading.Event()
        self.answers.set()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                upstream.heads.append({"path": self.path, **self.headers})
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/v1/responses":
                    self.stream()
                    return
                upstream.answers.wait(60)
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def stream(self) -> None:
                """An event, and another once the first has arrived."""
                self.send_response(200)
                for name, value in EventStream(None, None).headers.items():
                    self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(b"data: 1\n\n")
                if upstream.answers.wait(60):
                    self.wfile.write(b"data: 2\n\n")

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]


@pytest.fixture
def upstream():
    server = Upstream()
    yield server
    server.answers.set()
    server.server.shutdown()
    server.server.server_close()


def test_a_stream_is_not_buffered(before, upstream):
    proxy = before(upstream.port)
    upstream.answers.clear()
    with proxy.client() as client, client.stream("POST", "/v1/responses", content=b"{}") as response:
        lines = (line for line in response.iter_lines() if line)
        assert next(lines) == "data: 1"
        upstream.answers.set()
        assert list(lines) == ["data: 2"]


def test_a_client_disconnect_cancels_the_request(before):
    with running(ServerSettings(trusted_proxies=("127.0.0.1",), allowed_hosts=(NAME,))) as live:
        proxy = before(int(live.address.rpartition(":")[2]))
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 3000}
        with (
            proxy.client() as client,
            client.stream("POST", "/v1/chat/completions", json={**body, "ignore_eos": True}) as response,
        ):
            assert response.status_code == 200
            assert next(response.iter_lines()).startswith("data: ")
            assert engine().stats().running == 1
        until(idle, 10)


def test_clients_cannot_forge_their_address(before, upstream):
    proxy = before(upstream.port)
    reported = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "ftp"}
    with proxy.client() as client:
        assert client.post("/v1/completions", content=b"{}", headers=reported).text == "ok"
        assert client.get("/metrics").status_code == 404
    [head] = upstream.heads
    assert head["X-Forwarded-For"] == "127.0.0.1"
    assert head["X-Forwarded-Proto"] == proxy.address.partition(":")[0]
    assert head["Host"].partition(":")[0] == NAME


@pytest.mark.parametrize("before", ["nginx"], indirect=True)
def test_nginx_collects_slow_bodies_and_refuses_large_ones(before, upstream):
    proxy = before(upstream.port)
    with contextlib.closing(proxy.connection()) as slow:
        slow.putrequest("POST", "/v1/completions", skip_host=True)
        for name, value in (("Host", NAME), ("Content-Length", "4")):
            slow.putheader(name, value)
        slow.endheaders(b"12")
        time.sleep(0.3)
        assert not upstream.heads, "a partial body reached the server"
        slow.send(b"34")
        assert slow.getresponse().read() == b"ok"
    with contextlib.closing(proxy.connection()) as large:
        large.putrequest("POST", "/v1/completions", skip_host=True)
        for name, value in (("Host", NAME), ("Content-Length", str(LARGE))):
            large.putheader(name, value)
        large.endheaders()
        assert large.getresponse().status == 413
    assert len(upstream.heads) == 1


@pytest.mark.parametrize("before", ["nginx"], indirect=True)
def test_nginx_limits_concurrent_requests_per_address(before, upstream):
    proxy = before(upstream.port)
    upstream.answers.clear()
    with contextlib.ExitStack() as stack:
        asked = []
        for _ in range(32):
            asked.append(stack.enter_context(contextlib.closing(proxy.connection())))
            asked[-1].request("POST", "/v1/completions", b"{}", {"Host": NAME})
        until(lambda: len(upstream.heads) == 32, 30)
        with proxy.client() as client:
            assert client.post("/v1/completions", content=b"{}").status_code == 429
        upstream.answers.set()
        assert {one.getresponse().status for one in asked} == {200}
