"""Resolved addresses: what Python calls private is never public, however it is written, and an IPv4 address within an
IPv6 one is checked by itself."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator

from aria.media.fetch import _parse, is_public

WORDS = (
    "127.0.0.1",
    "::ffff:",
    "64:ff9b::",
    "2002:",
    "fe80::",
    "%eth0",
    "[",
    "]",
    ":80",
    "@",
    "http://",
    "%2e",
    "/..",
    "?",
    "#",
)
LONGEST = 200


def fuzz(data: bytes) -> None:
    if len(data) in (4, 16):
        _check_address(str(ipaddress.ip_address(data)))
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(ValueError):
        _check_address(text)
    try:
        url, host = _parse(text)
    except ValueError:
        return
    assert url.scheme in (b"http", b"https")
    for part in (url.host, url.target, host.encode()):
        assert not set(part) & set(b"\r\n\0 "), f"{part!r} could be more than one line of a request"
    assert url.host and b"@" not in url.host and b"/" not in url.host


def _check_address(address: str) -> None:
    ip = ipaddress.ip_address(address.partition("%")[0])
    public = is_public(address)
    closed = (
        ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_reserved or ip.is_unspecified
    )
    inner = getattr(ip, "ipv4_mapped", None)
    if inner is not None:
        assert public == is_public(str(inner))
    elif isinstance(ip, ipaddress.IPv6Address) and ip in ipaddress.IPv6Network("64:ff9b::/96"):
        assert public == is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    else:
        assert not (public and closed), f"{ip} is called public"


def seeds() -> Iterator[bytes]:
    for address in (
        "127.0.0.1",
        "8.8.8.8",
        "::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2001:4860::8888",
        "fe80::1%eth0",
    ):
        yield address.encode()
        yield ipaddress.ip_address(address.partition("%")[0]).packed
    yield "http://bücher.example:8080/a b?c=d e#f".encode()
    yield b"https://[2001:db8::1]/%zz"
    yield b"http://a@b/"
