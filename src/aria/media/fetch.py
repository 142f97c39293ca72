"""Bodies of http(s) addresses, from hosts in the public internet alone: checked where the connection is made."""

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
"""Content codings that change the bytes and are not undone here; gzip and deflate are, since some servers always send
them. Whatever else stands in the header (``aws-chunked``, ``UTF-8``, ``none``) says nothing about the bytes."""

# IANA's registries of special-purpose addresses, and what else does not lead to somebody else's public server.
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
"""All that is given out; loopback, link-local (fe80::/10), private (fc00::/7) and multicast lie outside."""
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
            return ip in _GLOBAL_V6 and not any(ip in network for network in _NON_PUBLIC_V6)
    return ip.is_global and not any(ip in network for network in _NON_PUBLIC_V4)


def fetch(url: str, limit: int, settings: MediaSettings, hold: Callable[[int], None] | None = None) -> bytes:
    """Body of an address: at most ``limit`` bytes, within ``settings.total_timeout`` seconds over all redirects.

    The name is resolved once a request, every address it resolves to has to be public (unless
    ``settings.private_addresses``), and the connection goes to one of just these. Redirects are followed here, each
    checked in the same way. Proxies in the environment are not used, and no credentials are sent. ``hold`` is called
    with numbers of bytes before these are kept; it may wait, and raise.

    Raises:
        ValueError: the address is not allowed, does not answer, answers with an error, or sends too much or too slowly.
        Cancelled: nobody waits for the body any more; see :mod:`aria.workers.cancellation`.
    """
    clock = _FetchDeadline(url, settings)
    backend = _Backend(clock, settings)
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
                    return _body(response, here, limit, clock, hold or (lambda _: None))
            here = urllib.parse.urljoin(here, targets[0])
    raise ValueError(f"could not fetch {shorten(url)}: more than {settings.max_redirects} redirects")


def _parse(url: str) -> tuple[httpcore2.URL, str]:
    """An address for the client, and its ``Host``."""
    try:
        parts = urllib.parse.urlsplit(url)
        port, name = parts.port, parts.hostname or ""
        name = name if name.isascii() else name.encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"{shorten(url)} is not an address: {error}") from error
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"addresses of kind {scheme}:// are not read ({shorten(url)}); use http:// or https://")
    if "@" in parts.netloc:
        raise ValueError(f"the address at {name!r:.80} holds a user's name; addresses with credentials are not read")
    if not _HOST.fullmatch(name):
        raise ValueError(f"{shorten(url)} names no host" + (f": {name!r:.80} is none" if name else ""))
    # Spaces and letters that no address has; what is coded already stays.
    target = urllib.parse.quote(parts.path or "/", safe="%/:=&~+!$,;'@()*[]")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="%/:=&?~+!$,;'@()*[]")
    host = f"[{name}]" if ":" in name else name
    if port not in (None, _DEFAULT_PORTS[scheme]):
        host += f":{port}"
    return httpcore2.URL(scheme=scheme, host=name, port=port or _DEFAULT_PORTS[scheme], target=target), host


def _body(
    response: httpcore2.Response, url: str, limit: int, clock: _FetchDeadline, hold: Callable[[int], None]
) -> bytes:
    if response.status not in (200, 203):  # 203: changed on its way, such as by a proxy that makes images smaller
        raise ValueError(f"could not fetch {shorten(url)}: it answers with status {response.status}")
    codings = [one.strip().lower() for one in ",".join(_headers(response, b"content-encoding")).split(",")]
    if unknown := [one for one in codings if one in _COMPRESSED]:
        raise ValueError(f"could not fetch {shorten(url)}: it sends {unknown[0]} coding, which was not asked for")
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
        clock.left(None)
    return body.getvalue()  # its own bytes, not a copy


def _inflated(chunks: Iterator[bytes], coding: str, url: str) -> Iterator[bytes]:
    """What gzip or zlib made smaller, in pieces of a bounded size however well it was compressed."""
    inflate: Any = None
    rest = b""
    try:
        for chunk in chunks:
            rest += chunk
            while len(rest) >= 2 or (rest and inflate and not inflate.eof):
                if inflate is None or (inflate.eof and rest.startswith(_GZIP)):  # several gzip files in a row are one
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
    """For zlib; some servers send what they call deflate without zlib's header."""
    headless = coding == "deflate" and not start.startswith(_GZIP)
    headless = headless and (start[0] & 15 != 8 or int.from_bytes(start[:2], "big") % 31 != 0)
    return -zlib.MAX_WBITS if headless else zlib.MAX_WBITS | 32


def _headers(response: httpcore2.Response, name: bytes) -> list[str]:
    """The values of a header. Servers send raw UTF-8 and Latin-1, although it should be ASCII: bytes that are no UTF-8
    become ``%E9``, which is what browsers make of them in a redirect."""
    values = []
    for value in (value for key, value in response.headers if key.lower() == name):
        try:
            values.append(value.decode())
        except UnicodeDecodeError:
            values.append("".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in value))
    return values


@contextlib.contextmanager
def _readable_errors(url: str) -> Iterator[None]:
    """What the client raises, as a ValueError that names the address."""
    try:
        yield
    except httpcore2.TimeoutException as error:
        raise ValueError(f"could not fetch {shorten(url)}: it does not answer in time") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
        raise ValueError(f"could not fetch {shorten(url)}: {error or type(error).__name__}") from error


class _FetchDeadline:
    """The time that is left for one fetch."""

    def __init__(self, url: str, settings: MediaSettings):
        self._url, self._total = url, settings.total_timeout
        self._end = time.monotonic() + settings.total_timeout

    def left(self, timeout: float | None) -> float:
        """Seconds that may go into one operation, which on its own might take ``timeout``.

        Raises:
            ValueError: no time is left.
            Cancelled: nobody waits any more.
        """
        check_cancelled()
        rest = self._end - time.monotonic()
        if rest <= 0:
            raise ValueError(f"could not fetch {shorten(self._url)}: it took longer than {self._total:g} s")
        return rest if timeout is None else min(rest, timeout)


class _Backend(httpcore2.NetworkBackend):
    """Connects to addresses that were checked, and to no name: nothing is resolved a second time."""

    def __init__(self, clock: _FetchDeadline, settings: MediaSettings):
        self._clock, self._settings = clock, settings

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
                return _Stream(_connect(family, address, self._clock, timeout), self._clock)
            except TimeoutError as error:
                failure = httpcore2.ConnectTimeout(str(error))
            except OSError as error:
                failure = httpcore2.ConnectError(str(error))
        raise failure or httpcore2.ConnectError(f"{host} has no address")

    def _addresses(self, host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
        try:
            found = _poll(_resolved(host, port), self._clock, self._settings.connect_timeout)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"{host} is not known ({error})") from error
        addresses: list[tuple[socket.AddressFamily, Any]] = list(dict.fromkeys((entry[0], entry[4]) for entry in found))
        if not self._settings.private_addresses and not all(is_public(str(address[0])) for _, address in addresses):
            # Which address it was stays here: names of an inner network would tell strangers about it.
            raise ValueError(
                f"{host} is not in the public internet, so nothing is fetched from there; "
                "MediaSettings(private_addresses=True) allows it"
            )
        return addresses


def _resolved(host: str, port: int) -> Callable[[], list[Any]]:
    """A function that gives the addresses of a name once they are known; a resolver cannot be interrupted."""
    answer: Future[list[Any]] = Future()

    def resolve() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=resolve, daemon=True, name="aria-resolve").start()
    return lambda: answer.result(POLL_SECONDS)


def _connect(family: socket.AddressFamily, address: Any, clock: _FetchDeadline, timeout: float | None) -> socket.socket:
    """A connected socket; waits in shorten turns, so that a download nobody waits for ends here too."""
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
                    raise TimeoutError("the connection was not taken in time")

            _poll(connected, clock, timeout)
        if error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
    except BaseException:
        connection.close()
        raise
    return connection


def _poll(operation: Callable[[], T], clock: _FetchDeadline, timeout: float | None) -> T:
    """Repeat an operation that gives up after :data:`POLL_SECONDS` until its own time or that of the whole is over.

    Raises:
        TimeoutError: ``timeout`` seconds have passed.
    """
    end = time.monotonic() + clock.left(timeout)
    while True:
        try:
            return operation()
        except TimeoutError:
            clock.left(None)
            if time.monotonic() >= end:
                raise


class _Stream(httpcore2.NetworkStream):
    """A connection whose every operation ends when the time of the whole is up, or when nobody waits any more."""

    def __init__(self, connection: socket.socket, clock: _FetchDeadline):
        self._connection, self._clock = connection, clock
        connection.settimeout(POLL_SECONDS)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return _poll(lambda: self._connection.recv(max_bytes), self._clock, timeout)
        except TimeoutError as error:
            raise httpcore2.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        try:
            while rest:
                rest = rest[_poll(lambda: self._connection.send(rest), self._clock, timeout) :]  # noqa: B023
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
            # The socket belongs to the new stream from here on.
            self._connection = secured = ssl_context.wrap_socket(
                self._connection, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            _poll(secured.do_handshake, self._clock, timeout)
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
