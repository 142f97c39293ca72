"""Fetching: non-public addresses are rejected however they are written, and responses are limited in size and time."""

from __future__ import annotations

import gzip
import os
import socket
import threading
import zlib
from typing import Any

import pytest

from aria.media import fetch as module
from aria.media.fetch import fetch, is_public
from aria.media.limits import MediaSettings
from tests.helpers.media_site import Resolver, site

OPEN = MediaSettings(private_addresses=True, connect_timeout=60, read_timeout=60, total_timeout=120)
CLOSED = MediaSettings(connect_timeout=60, read_timeout=60, total_timeout=120)
LIMIT = 10_000

FORBIDDEN_HOSTS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0x7f.0x0.0x0.0x1",
    "0177.0.0.1",
    "017700000001",
    "0",
    "0.0.0.0",
    "10.0.0.1",
    "167772161",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "0xc0a80101",
    "169.254.169.254",
    "2852039166",
    "0xa9.0xfe.0xa9.0xfe",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "198.18.0.1",
    "203.0.113.7",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:169.254.169.254]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2001:0:7f00:1::1]",
    "[2001:db8::1]",
    "[fd00:ec2::254]",
    "[fc00::1]",
    "[fe80::1]",
    "[ff02::1]",
    "[fec0::1]",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
]


@pytest.mark.parametrize("host", FORBIDDEN_HOSTS)
def test_private_addresses_are_refused_however_they_are_written(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    monkeypatch.setattr(module, "_connect", lambda *args: connected.append(args))
    with pytest.raises(ValueError, match=r"not on the public internet|cannot be resolved|is not an address") as error:
        fetch(f"http://{host}:8080/latest/meta-data/", LIMIT, CLOSED)
    assert not connected, error


def test_most_spellings_of_addresses_reach_the_check() -> None:
    # Forms that this system does not parse as an address fail to resolve; that should be the exception.
    reached = 0
    for host in FORBIDDEN_HOSTS:
        with pytest.raises(ValueError) as error:
            fetch(f"http://{host}/", LIMIT, CLOSED)
        reached += "not on the public internet" in str(error.value)
    assert reached >= 30


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450::5",
                                     "64:ff9b::8.8.8.8", "::ffff:8.8.8.8", "172.32.0.1", "100.128.0.1"])  # fmt: skip
def test_public_addresses_are_recognized(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("addresses", [
    ["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["8.8.8.8", "fd00:ec2::254"], ["fe80::1%eth0"],
    ["::ffff:169.254.169.254"], ["2002:a00:1::1"],
], ids=str)  # fmt: skip
def test_names_of_private_addresses_are_rejected(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    monkeypatch.setattr(module, "_connect", lambda *args: connected.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", Resolver({"inside.example": [addresses]}))
    with pytest.raises(ValueError, match=r"inside\.example is not on the public internet") as error:
        fetch("http://inside.example/", LIMIT, CLOSED)
    assert not connected
    assert not any(address in str(error.value) for address in addresses), "an inner address is told to strangers"


def test_a_name_is_resolved_once_and_the_checked_address_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver({"rebinding.example": [["8.8.8.8"], ["127.0.0.1"]]})
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    connected: list[str] = []

    def refuse(family: object, address: tuple[str, int], *args: object) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError("closed")

    monkeypatch.setattr(module, "_connect", refuse)
    with pytest.raises(ValueError, match="closed"):
        fetch("http://rebinding.example/", LIMIT, CLOSED)
    assert connected == ["8.8.8.8"] and resolver.asked == ["rebinding.example"]


def _as_public(monkeypatch: pytest.MonkeyPatch, **names: list[list[str]]) -> Resolver:
    """Treat the first loopback address as public, so that a local server can stand for a public one."""
    resolver = Resolver({name.replace("_", "."): answers for name, answers in names.items()})
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    real = is_public
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1" or real(address))
    return resolver


REDIRECTS = [
    "http://localhost.localdomain.example/",
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "//192.168.0.1/a",
    "http://[::1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://2852039166/",
    "http://0x0a.1/",
    "http://127.0.0.2/",
    "file:///etc/hosts",
    "ftp://example.org/a",
    "gopher://127.0.0.1/",
    "data:text/plain,hello",
    "http://user:word@8.8.8.8/",
]


@pytest.mark.parametrize("target", REDIRECTS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_checked_again(target: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _as_public(monkeypatch, outside_example=[["127.0.0.1"]], localhost_localdomain_example=[["10.1.2.3"]])
    asked = []

    def answer(handler: Any) -> Any:
        asked.append(handler.path)
        return status, {"Location": target}, b""

    with site(answer) as address:
        url = address.replace("127.0.0.1", "outside.example")
        with pytest.raises(ValueError, match=r"not on the public internet|are not supported|cannot be resolved"):
            fetch(url + "/start", LIMIT, CLOSED)
    assert asked == ["/start"]


def test_a_redirect_to_a_private_address_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = _as_public(monkeypatch, turning_example=[["127.0.0.1"], ["192.168.0.5"]])
    inside = pytest.raises(ValueError, match=r"turning\.example is not on the public internet")
    with site(lambda handler: (302, {"Location": "/again"}, b"")) as address, inside:
        fetch(address.replace("127.0.0.1", "turning.example"), LIMIT, CLOSED)
    assert resolver.asked == ["turning.example"] * 2


def test_redirects_are_followed_and_counted() -> None:
    def answer(handler: Any) -> Any:
        number = int(handler.path.rpartition("/")[2])
        return (302, {"Location": f"{number - 1}"}, b"") if number else (200, {}, b"here")

    with site(answer) as address:
        assert fetch(f"{address}/a/5", LIMIT, OPEN) == b"here"
        with pytest.raises(ValueError, match="more than 5 redirects"):
            fetch(f"{address}/a/6", LIMIT, OPEN)


def test_request_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "getaddrinfo", Resolver({"here.example": [["127.0.0.1"]]}))
    seen: list[Any] = []

    def answer(handler: Any) -> Any:
        seen.append((handler.path, dict(handler.headers)))
        return 200, {}, b"body"

    with site(answer) as address:
        port = address.rpartition(":")[2]
        assert fetch(f"http://here.example:{port}/a b/ä?x=1&y=%20#part", LIMIT, OPEN) == b"body"
    path, headers = seen[0]
    assert path == "/a%20b/%C3%A4?x=1&y=%20"
    assert headers["Host"] == f"here.example:{port}" and headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & headers.keys()


@pytest.mark.parametrize(("url", "message"), [
    ("http://me:word@127.0.0.1/", "credentials are not supported"),
    ("http://127.0.0.1@8.8.8.8/", "credentials are not supported"),
    ("http://8.8.8.8:99999/", "is not an address"),
    ("http://[::1/", "is not an address"),
    ("http:///path", "has no valid host"),
    ("http://a b/", "has no valid host: .a b."),
    ("file:///etc/passwd", "file:// addresses are not supported"),
    ("http://nowhere.invalid/", "cannot be resolved"),
    ("http://" + "a" * 70 + ".example/", "not an address|cannot be resolved"),
])  # fmt: skip
def test_malformed_addresses(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(url, LIMIT, OPEN)


def test_size_is_limited_with_and_without_content_length() -> None:
    sent = []

    def answer(handler: Any) -> Any:
        if handler.path == "/told":
            return 200, {"Content-Length": str(LIMIT + 1)}, b""
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(10_000):
                handler.wfile.write(bytes(1000))
                sent.append(1000)
        except ConnectionError:
            pass
        return None

    with site(answer) as address:
        for path in ("/told", "/untold"):
            with pytest.raises(ValueError, match="sends more than the 10,000 bytes"):
                fetch(address + path, LIMIT, OPEN)
    assert sum(sent) < 10_000_000


@pytest.mark.parametrize(("status", "headers", "message"), [
    (404, {}, "status 404"), (500, {}, "status 500"), (204, {}, "status 204"), (302, {}, "status 302"),
    (200, {"Content-Encoding": "br"}, "br coding"), (206, {}, "status 206"),
])  # fmt: skip
def test_rejected_responses(status: int, headers: dict[str, str], message: str) -> None:
    with site(lambda handler: (status, headers, b"")) as address, pytest.raises(ValueError, match=message):
        fetch(address, LIMIT, OPEN)


@pytest.mark.parametrize("coding", ["aws-chunked", "UTF-8", "none", "binary", "identity", "", "utf-8, identity"])
def test_unknown_content_codings_without_effect_are_ignored(coding: str) -> None:
    with site(lambda handler: (200, {"Content-Encoding": coding}, b"body")) as address:
        assert fetch(address, LIMIT, OPEN) == b"body"


def test_compressed_bodies_are_inflated_within_the_limit() -> None:
    sent: dict[str, tuple[str, bytes]] = {
        "/gzip": ("gzip", gzip.compress(b"body")),
        "/deflate": ("deflate", zlib.compress(b"body")),
        "/headless": ("Deflate", zlib.compress(b"body")[2:-4]),
        "/members": ("GZIP", gzip.compress(b"bo") + gzip.compress(b"dy")),
        "/padded": ("gzip", gzip.compress(b"body") + bytes(20)),
        "/twice": ("gzip, x-gzip", gzip.compress(gzip.compress(b"body"))),
        "/bomb": ("gzip", gzip.compress(bytes(50 * LIMIT))),
        "/cut": ("gzip", gzip.compress(os.urandom(100))[:-20]),
        "/damaged": ("gzip", b"not gzip"),
        "/full": ("gzip", gzip.compress(bytes(LIMIT))),
    }
    with site(lambda handler: (200, {"Content-Encoding": sent[handler.path][0]}, sent[handler.path][1])) as address:
        for path in ("/gzip", "/deflate", "/headless", "/members", "/padded", "/twice"):
            assert fetch(address + path, LIMIT, OPEN) == b"body"
        assert fetch(address + "/full", LIMIT, OPEN) == bytes(LIMIT)
        for path, message in (("/bomb", "sends more than"), ("/cut", "ends too early"), ("/damaged", "is damaged")):
            with pytest.raises(ValueError, match=message):
                fetch(address + path, LIMIT, OPEN)


def test_codings_of_several_headers_are_undone_together() -> None:
    def answer(handler: Any) -> Any:
        handler.send_response(203)
        handler.send_header("Content-Encoding", "identity")
        handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(gzip.compress(b"body"))

    with site(answer) as address:
        assert fetch(address, LIMIT, OPEN) == b"body"


@pytest.mark.parametrize(("location", "asked"), [
    (b"/caf\xe9.png", "/caf%E9.png"), (b"/\xe6\x97\xa5?q=\xc3\xa9", "/%E6%97%A5?q=%C3%A9"),
    (b"a b.png#part", "/x/a%20b.png"),
])  # fmt: skip
def test_redirects_are_read_as_browsers_read_them(location: bytes, asked: str) -> None:
    def answer(handler: Any) -> Any:
        if handler.path != "/x/start":
            return 200, {}, handler.path.encode()
        handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")
        return None

    with site(answer) as address:
        assert fetch(address + "/x/start", LIMIT, OPEN) == asked.encode()


def test_a_redirect_in_raw_utf8_is_followed() -> None:
    def answer(handler: Any) -> Any:
        if handler.path != "/":
            return 200, {}, handler.path.encode()
        handler.wfile.write("HTTP/1.1 302 Found\r\nLocation: /caf\u00e9.png\r\nContent-Length: 0\r\n\r\n".encode())

    with site(answer) as address:
        assert fetch(address, LIMIT, OPEN) == b"/caf%C3%A9.png"


@pytest.mark.parametrize("part", ["headers", "body"])
def test_slow_servers_time_out(part: str) -> None:
    settings = MediaSettings(private_addresses=True, read_timeout=5, total_timeout=0.5)
    over = threading.Event()

    def answer(handler: Any) -> Any:
        line = b"HTTP/1.1 200 OK\r\n" + (b"X-A: " if part == "headers" else b"Content-Length: 9000\r\n\r\n")
        handler.wfile.write(line)
        try:
            while not over.wait(0.05):
                handler.wfile.write(b"a")
                handler.wfile.flush()
        except ConnectionError:
            pass
        return None

    with site(answer) as address:
        with pytest.raises(ValueError, match=r"took longer than 0\.5 s|does not respond in time"):
            fetch(address, LIMIT, settings)
        over.set()


def test_silent_and_absent_servers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ValueError, match="does not respond in time"):
            fetch(f"http://127.0.0.1:{port}/", LIMIT, MediaSettings(private_addresses=True, read_timeout=0.2))
    with pytest.raises(ValueError, match="could not fetch"):
        fetch(f"http://127.0.0.1:{port}/", LIMIT, OPEN)


def test_tls_names_the_host_and_not_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Resolver({"secure.example": [["127.0.0.1"]]}))
    hello: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            connection, _ = server.accept()
            with connection:
                hello.append(connection.recv(65536))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        with pytest.raises(ValueError, match="could not fetch"):
            fetch(f"https://secure.example:{server.getsockname()[1]}/", LIMIT, OPEN)
        thread.join(10)
    assert hello and hello[0][0] == 22 and b"secure.example" in hello[0]


def test_settings_out_of_range() -> None:
    for settings in ({"image_bytes": 0}, {"total_timeout": 0}, {"max_redirects": -1}, {"local_folders": "/data"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
            MediaSettings(**settings)  # type: ignore[arg-type]
