"""Headers for access control: a server without keys only accepts its own host names and addresses, and a client is
identified by its address or network."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from starlette.datastructures import Headers

from aria.serve.active_requests import client_of
from aria.serve.admission import AllowedHosts, ApiKeys
from aria.serve.errors import ApiError
from aria.serve.inflate import is_compressed

LONGEST = 300
WORDS = (
    "localhost",
    ".localhost",
    "aria.example",
    "x.aria.example",
    "127.0.0.1",
    "[::1]",
    ":8000",
    ".",
    "@",
    "%",
    "fe80::1%eth0",
    "Bearer ",
    "gzip",
    "identity",
    ",",
)
NAMES = ("aria.example", "*.inner.example")
HOSTS, KEYS = AllowedHosts(NAMES), ApiKeys(["secret", "clé"])


def fuzz(data: bytes) -> None:
    text = data.decode("latin-1")
    raw = [(b"host", data), (b"content-encoding", data)]
    try:
        HOSTS.check(Headers(raw=raw))
    except ApiError as error:
        assert error.status in (400, 421) and len(error.message) < 500
    else:
        _check_host(text)
    _check_client(text)
    try:
        KEYS.check(text)
    except ApiError as error:
        assert error.status == 401
    else:
        assert text.partition(" ")[2].strip() in ("secret", "clé")
    try:
        is_compressed(Headers(raw=raw))
    except ApiError as error:
        assert error.status == 415 and len(error.message) < 500


def _check_host(text: str) -> None:
    """A browser would have to have reached one of the names, or an address, to send this."""
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    name = name.lower().rstrip(".")
    known = name in ("localhost", "aria.example") or name.endswith((".localhost", ".inner.example"))
    if not known:
        ipaddress.ip_address(name.partition("%")[0])


def _check_client(text: str) -> None:
    client = client_of(text)
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        assert client == text
        return
    if ip.version == 6 and ip.ipv4_mapped is None and not ip.is_loopback:
        assert ip in ipaddress.ip_network(client)
        assert ipaddress.ip_network(client).prefixlen == 64
    else:
        assert ipaddress.ip_address(client.partition("%")[0]) in (ip, getattr(ip, "ipv4_mapped", None))


def seeds() -> Iterator[bytes]:
    for text in (
        "localhost:8000",
        "ARIA.example.",
        "a.inner.example",
        "127.0.0.1:80",
        "[::1]:8000",
        "2001:db8::1",
        "::ffff:10.0.0.1",
    ):
        yield text.encode()
    yield b"Bearer secret"
    yield b"gzip, identity"
    yield b"evil.example"
