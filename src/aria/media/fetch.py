"""Fetch http(s) addresses from public hosts only. The check is made where the connection is opened."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import os
import re
import selectors
import socket
import ssl
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import httpcore2

from aria.media.limits import MediaSettings, shorten
from aria.workers.cancellation import POLL_SECONDS, check_cancelled

T = TypeVar("T")

_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HELD_BYTES = 1 << 20
_HOST = re.compile(r"[a-z0-9_.:%~-]+", re.IGNORECASE | re.ASCII)
_INFLATED_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
_HEADERS = [("User-Agent", "aria-moe"), ("Accept", "*/*"), ("Accept-Encoding", "identity")]
_COMPRESSED = ("br", "compress", "x-compress", "dcb", "dcz", "zstd")
"""Content codings that are not supported. gzip and deflate are, because some servers send them unasked. Other values of
the header (``aws-chunked``, ``UTF-8``, ``none``) do not change the bytes."""

# IANA's special-purpose address registries, and other ranges that are not public servers.
_NON_PUBLIC_V4 = tuple(
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
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All global unicast addresses; not loopback, link-local (fe80::/10), private (fc00::/7) or multicast."""
_NON_PUBLIC_V6 = tuple(
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
    """Whether an IP address, as returned by the system's resolver, belongs to the public internet.

    An IPv4 address inside an IPv6 one (mapped, or for a translator) is checked by itself; tunnels (6to4, Teredo) are
    always rejected.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            return ip in _GLOBAL_V6 and not any(ip in network for network in _NON_PUBLIC_V6)
    return ip.is_global and not any(ip in network for network in _NON_PUBLIC_V4)


def fetch(url: str, limit: int, settings: MediaSettings, hold: Callable[[int], None] | None = None) -> bytes:
    """Fetch the body of an address: at most ``limit`` bytes, within ``settings.total_timeout`` seconds in total.

    The host name is resolved once per request. Every address that it resolves to must be public (unless
    ``settings.private_addresses``), and the connection goes to one of exactly these. Redirects are followed here, each
    with the same checks. Proxies from the environment are not used and no credentials are sent. ``hold`` is called with
    a number of bytes before they are kept in memory; it may block or raise.

    Raises:
        ValueError: The address is not allowed, does not respond, responds with an error, or sends too much or too
            slowly.
        Cancelled: The caller was cancelled; see :mod:`aria.workers.cancellation`.
    """
    deadline = _FetchDeadline(url, settings)
    backend = _Backend(deadline, settings)
    timeouts = {"connect": settings.connect_timeout, "read": settings.read_timeout, "write": settings.read_timeout}
    here = url
    with httpcore2.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool:
        for _ in range(settings.max_redirects + 1):
            address, host = _parse(here)
            headers = [("Host", host), *_HEADERS]
            with (
                _readable_errors(here),
                pool.stream("GET", address, headers=headers, extensions={"timeout": timeouts}) as response,
            ):
                targets = _headers(response, b"location")
                if response.status not in _REDIRECTS or not targets:
                    return _body(response, here, limit, deadline, hold or (lambda _: None))
            here = urllib.parse.urljoin(here, targets[0])
    raise ValueError(f"could not fetch {shorten(url)}: more than {settings.max_redirects} redirects")


def _parse(url: str) -> tuple[httpcore2.URL, str]:
    """Parse an address into the URL for the HTTP client and the ``Host`` header."""
    try:
        parts = urllib.parse.urlsplit(url)
        port, name = parts.port, parts.hostname or ""
        name = name if name.isascii() else name.encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"{shorten(url)} is not an address: {error}") from error
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"{scheme}:// addresses are not supported ({shorten(url)}); use http:// or https://")
    if "@" in parts.netloc:
        raise ValueError(f"the address at {name!r:.80} has a user name; addresses with credentials are not supported")
    if not _HOST.fullmatch(name):
        raise ValueError(f"{shorten(url)} has no valid host" + (f": {name!r:.80}" if name else ""))
    # Escape spaces and other characters that are not allowed; existing escapes stay.
    target = urllib.parse.quote(parts.path or "/", safe="%/:=&~+!$,;'@()*[]")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="%/:=&?~+!$,;'@()*[]")
    host = f"[{name}]" if ":" in name else name
    if port not in (None, _DEFAULT_PORTS[scheme]):
        host += f":{port}"
    return httpcore2.URL(scheme=scheme, host=name, port=port or _DEFAULT_PORTS[scheme], target=target), host


def _body(
    response: httpcore2.Response, url: str, limit: int, deadline: _FetchDeadline, hold: Callable[[int], None]
) -> bytes:
    if response.status not in (200, 203):  # 203: modified in transit, such as by a proxy that compresses images
        raise ValueError(f"could not fetch {shorten(url)}: the server responds with status {response.status}")
    codings = [one.strip().lower() for one in ",".join(_headers(response, b"content-encoding")).split(",")]
    if unknown := [one for one in codings if one in _COMPRESSED]:
        raise ValueError(f"could not fetch {shorten(url)}: it sends {unknown[0]} coding, which was not requested")
    too_much = f"{shorten(url)} sends more than the {limit:,} bytes allowed"
    if any(length.isdecimal() and int(length) > limit for length in _headers(response, b"content-length")):
        raise ValueError(too_much)
    chunks: Iterator[bytes] = response.iter_stream()
    for coding in reversed(codings):
        if coding in ("gzip", "x-gzip", "deflate"):
            chunks = _inflated(chunks, coding, url)
    body, held = io.BytesIO(), 0
    for chunk in chunks:
        if body.tell() + len(chunk) > limit:
            raise ValueError(too_much)
        if body.tell() + len(chunk) > held:
            hold(_HELD_BYTES)
            held += _HELD_BYTES
        body.write(chunk)
        deadline.left(None)
    return body.getvalue()  # no copy


def _inflated(chunks: Iterator[bytes], coding: str, url: str) -> Iterator[bytes]:
    """Decompress gzip or zlib data in pieces of bounded size, whatever the compression ratio."""
    inflate: Any = None
    rest = b""
    try:
        for chunk in chunks:
            rest += chunk
            while len(rest) >= 2 or (rest and inflate and not inflate.eof):
                if inflate is None or (inflate.eof and rest.startswith(_GZIP)):  # concatenated gzip members
                    inflate = zlib.decompressobj(_window_bits(rest, coding))
                elif inflate.eof:
                    return  # padding
                yield inflate.decompress(rest, _INFLATED_BYTES)
                rest = inflate.unused_data or inflate.unconsumed_tail
        while inflate and not inflate.eof and (piece := inflate.decompress(rest, _INFLATED_BYTES)):
            yield piece
            rest = inflate.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"could not fetch {shorten(url)}: its compressed body is damaged ({error})") from error
    if inflate is None or not inflate.eof:
        raise ValueError(f"could not fetch {shorten(url)}: its compressed body ends too early")


def _window_bits(start: bytes, coding: str) -> int:
    """The ``wbits`` argument for zlib. Some servers send raw deflate data, without the zlib header."""
    raw = coding == "deflate" and not start.startswith(_GZIP)
    raw = raw and (start[0] & 15 != 8 or int.from_bytes(start[:2], "big") % 31 != 0)
    return -zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32


def _headers(response: httpcore2.Response, name: bytes) -> list[str]:
    """The values of a header.

    Values should be ASCII, but servers also send UTF-8 and Latin-1. Bytes that are not valid UTF-8 are percent-encoded,
    as browsers do in a redirect.
    """
    values = []
    for value in (value for key, value in response.headers if key.lower() == name):
        try:
            values.append(value.decode())
        except UnicodeDecodeError:
            values.append("".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in value))
    return values


@contextlib.contextmanager
def _readable_errors(url: str) -> Iterator[None]:
    """Turn errors of the HTTP client into ValueErrors that name the address."""
    try:
        yield
    except httpcore2.TimeoutException as error:
        raise ValueError(f"could not fetch {shorten(url)}: the server does not respond in time") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
        raise ValueError(f"could not fetch {shorten(url)}: {error or type(error).__name__}") from error


class _FetchDeadline:
    """The time left for one fetch."""

    def __init__(self, url: str, settings: MediaSettings):
        self._url, self._total = url, settings.total_timeout
        self._end = time.monotonic() + settings.total_timeout

    def left(self, timeout: float | None) -> float:
        """Seconds allowed for one operation: the time left, but no more than ``timeout``.

        Raises:
            ValueError: No time is left.
            Cancelled: The caller was cancelled.
        """
        check_cancelled()
        rest = self._end - time.monotonic()
        if rest <= 0:
            raise ValueError(f"could not fetch {shorten(self._url)}: it took longer than {self._total:g} s")
        return rest if timeout is None else min(rest, timeout)


class _Backend(httpcore2.NetworkBackend):
    """Connects to checked IP addresses only: a host name is never resolved a second time."""

    def __init__(self, deadline: _FetchDeadline, settings: MediaSettings):
        self._deadline, self._settings = deadline, settings

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        failure: Exception | None = None
        for family, address in self._addresses(host, port):
            try:
                return _Stream(_connect(family, address, self._deadline, timeout), self._deadline)
            except TimeoutError as error:
                failure = httpcore2.ConnectTimeout(str(error))
            except OSError as error:
                failure = httpcore2.ConnectError(str(error))
        raise failure or httpcore2.ConnectError(f"{host} has no address")

    def _addresses(self, host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
        try:
            found = _poll(_resolved(host, port), self._deadline, self._settings.connect_timeout)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"{host} cannot be resolved ({error})") from error
        addresses: list[tuple[socket.AddressFamily, Any]] = list(dict.fromkeys((entry[0], entry[4]) for entry in found))
        if not self._settings.private_addresses and not all(is_public(str(address[0])) for _, address in addresses):
            # The message leaves out the resolved address, which could disclose the layout of a private network.
            raise ValueError(
                f"{host} is not on the public internet, so nothing is fetched from it; "
                "MediaSettings(private_addresses=True) allows it"
            )
        return addresses


def _resolved(host: str, port: int) -> Callable[[], list[Any]]:
    """Resolve a name in a thread, since the resolver cannot be interrupted; returns a polling function."""
    answer: Future[list[Any]] = Future()

    def resolve() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=resolve, daemon=True, name="aria-resolve").start()
    return lambda: answer.result(POLL_SECONDS)


def _connect(
    family: socket.AddressFamily, address: Any, deadline: _FetchDeadline, timeout: float | None
) -> socket.socket:
    """Return a connected socket. Polls, so that a cancelled download ends here too."""
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect(address)
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_WRITE)

            def connected() -> None:
                if not selector.select(POLL_SECONDS):
                    raise TimeoutError("the connection was not accepted in time")

            _poll(connected, deadline, timeout)
        if error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
    except BaseException:
        connection.close()
        raise
    return connection


def _poll(operation: Callable[[], T], deadline: _FetchDeadline, timeout: float | None) -> T:
    """Repeat an operation that times out after :data:`POLL_SECONDS`, until ``timeout`` or the deadline has passed.

    Raises:
        TimeoutError: ``timeout`` seconds have passed.
    """
    end = time.monotonic() + deadline.left(timeout)
    while True:
        try:
            return operation()
        except TimeoutError:
            deadline.left(None)
            if time.monotonic() >= end:
                raise


class _Stream(httpcore2.NetworkStream):
    """A connection whose operations end at the deadline of the fetch, or when the caller is cancelled."""

    def __init__(self, connection: socket.socket, deadline: _FetchDeadline):
        self._connection, self._deadline = connection, deadline
        connection.settimeout(POLL_SECONDS)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return _poll(lambda: self._connection.recv(max_bytes), self._deadline, timeout)
        except TimeoutError as error:
            raise httpcore2.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        try:
            while rest:
                rest = rest[_poll(lambda: self._connection.send(rest), self._deadline, timeout) :]  # noqa: B023
        except TimeoutError as error:
            raise httpcore2.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.WriteError(str(error)) from error

    def close(self) -> None:
        self._connection.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            # From here on the socket belongs to the TLS stream.
            self._connection = secured = ssl_context.wrap_socket(
                self._connection, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            _poll(secured.do_handshake, self._deadline, timeout)
        except TimeoutError as error:
            self.close()
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            self.close()
            raise httpcore2.ConnectError(str(error)) from error
        return self

    def get_extra_info(self, info: str) -> Any:
        secured = isinstance(self._connection, ssl.SSLSocket)
        return self._connection if info == "socket" or (info == "ssl_object" and secured) else None
