"""Bodies of http(s) addresses, from hosts in the public internet alone: checked where the connection is made."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore2

from aria.processor.limits import MediaSettings, short

_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HEADERS = [("User-Agent", "aria-moe"), ("Accept", "*/*"), ("Accept-Encoding", "identity")]

# IANA's registries of special-purpose addresses, and what else does not lead to somebody else's public server.
_CLOSED_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind carriers' NAT; some clouds' metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host agent
        "169.254.0.0/16",  # link-local, with most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_OPEN_V6 = ipaddress.IPv6Network("2000::/3")
"""All that is given out; loopback, link-local (fe80::/10), private (fc00::/7) and multicast lie outside."""
_CLOSED_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocols, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address, in the form that the system resolves names to, belongs to the public internet.

    An IPv4 address inside an IPv6 one (mapped, or for a translator) is judged for itself; tunnels (6to4, Teredo) are
    refused altogether, wherever they lead.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            return ip in _OPEN_V6 and not any(ip in network for network in _CLOSED_V6)
    return ip.is_global and not any(ip in network for network in _CLOSED_V4)


def fetch(url: str, limit: int, settings: MediaSettings) -> bytes:
    """Body of an address: at most ``limit`` bytes, within ``settings.total_timeout`` seconds over all redirects.

    The name is resolved once a request, every address it resolves to has to be public (unless
    ``settings.private_addresses``), and the connection goes to one of just these. Redirects are followed here, each
    checked in the same way. Proxies in the environment are not used, and no credentials are sent.

    Raises:
        ValueError: the address is not allowed, does not answer, answers with an error, or sends too much or too slowly.
    """
    clock = _Clock(url, settings)
    backend = _Backend(clock, settings)
    timeouts = {"connect": settings.connect_timeout, "read": settings.read_timeout, "write": settings.read_timeout}
    here = url
    with httpcore2.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool:
        for _ in range(settings.max_redirects + 1):
            address, host = _parse(here)
            headers = [("Host", host), *_HEADERS]
            with (
                _said_plainly(here),
                pool.stream("GET", address, headers=headers, extensions={"timeout": timeouts}) as response,
            ):
                target = _header(response, b"location")
                if response.status not in _REDIRECTS or target is None:
                    return _body(response, here, limit, clock)
            here = urllib.parse.urljoin(here, target)
    raise ValueError(f"could not fetch {short(url)}: more than {settings.max_redirects} redirects")


def _parse(url: str) -> tuple[httpcore2.URL, str]:
    """An address for the client, and its ``Host``."""
    try:
        parts = urllib.parse.urlsplit(url)
        port, name = parts.port, parts.hostname or ""
        name = name if name.isascii() else name.encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"{short(url)} is not an address: {error}") from error
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"addresses of kind {scheme}:// are not read ({short(url)}); use http:// or https://")
    if "@" in parts.netloc:
        raise ValueError(f"the address at {name!r:.80} holds a user's name; addresses with credentials are not read")
    if not name:
        raise ValueError(f"{short(url)} names no host")
    # Spaces and letters that no address has; what is coded already stays.
    target = urllib.parse.quote(parts.path or "/", safe="%/:=&~+!$,;'@()*[]")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="%/:=&?~+!$,;'@()*[]")
    host = f"[{name}]" if ":" in name else name
    if port not in (None, _DEFAULT_PORTS[scheme]):
        host += f":{port}"
    return httpcore2.URL(scheme=scheme, host=name, port=port or _DEFAULT_PORTS[scheme], target=target), host


def _body(response: httpcore2.Response, url: str, limit: int, clock: _Clock) -> bytes:
    if response.status != 200:
        raise ValueError(f"could not fetch {short(url)}: it answers with status {response.status}")
    if (coding := _header(response, b"content-encoding") or "identity").lower() != "identity":
        raise ValueError(f"could not fetch {short(url)}: it sends {coding!r:.40} coding, which was not asked for")
    too_much = f"{short(url)} sends more than the {limit:,} bytes allowed"
    length = _header(response, b"content-length") or ""
    if length.isdecimal() and int(length) > limit:
        raise ValueError(too_much)
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > limit:
            raise ValueError(too_much)
        clock.left(None)
    return bytes(body)


def _header(response: httpcore2.Response, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), None)


@contextlib.contextmanager
def _said_plainly(url: str) -> Iterator[None]:
    """What the client raises, as a ValueError that names the address."""
    try:
        yield
    except httpcore2.TimeoutException as error:
        raise ValueError(f"could not fetch {short(url)}: it does not answer in time") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
        raise ValueError(f"could not fetch {short(url)}: {error or type(error).__name__}") from error


class _Clock:
    """The time that is left for one fetch."""

    def __init__(self, url: str, settings: MediaSettings):
        self._url, self._total = url, settings.total_timeout
        self._end = time.monotonic() + settings.total_timeout

    def left(self, timeout: float | None) -> float:
        """Seconds that may go into one operation, which on its own might take ``timeout``."""
        rest = self._end - time.monotonic()
        if rest <= 0:
            raise ValueError(f"could not fetch {short(self._url)}: it took longer than {self._total:g} s")
        return rest if timeout is None else min(rest, timeout)


class _Backend(httpcore2.NetworkBackend):
    """Connects to addresses that were checked, and to no name: nothing is resolved a second time."""

    def __init__(self, clock: _Clock, settings: MediaSettings):
        self._clock, self._settings = clock, settings
        self._system = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        failure: Exception | None = None
        for address in self._addresses(host, port):
            try:
                stream = self._system.connect_tcp(
                    address, port, self._clock.left(timeout), local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _Stream(stream, self._clock)
        raise failure or httpcore2.ConnectError(f"{host} has no address")

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"{host} is not known ({error})") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._settings.private_addresses and not all(map(is_public, addresses)):
            # Which address it was stays here: names of an inner network would tell strangers about it.
            raise ValueError(
                f"{host} is not in the public internet, so nothing is fetched from there; "
                "MediaSettings(private_addresses=True) allows it"
            )
        return addresses


class _Stream(httpcore2.NetworkStream):
    """A connection whose every operation ends when the time of the whole is up."""

    def __init__(self, stream: httpcore2.NetworkStream, clock: _Clock):
        self._stream, self._clock = stream, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._clock.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._clock.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._clock.left(timeout)), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
