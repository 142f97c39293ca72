"""What every request passes before a route sees it: a key, a size, and a place."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aria.serve.errors import ApiError, overloaded, unexpected
from aria.serve.exchange import CLIENT_GONE, Exchange
from aria.serve.inflate import inflated, is_compressed
from aria.serve.metrics import Metrics
from aria.serve.settings import ServerSettings

logger = logging.getLogger(__name__)

KEYED = ("/v1/", "/tokenize", "/detokenize", "/metrics")
"""Beginnings of the routes that need a key, where there are keys."""
BODY_SECONDS = 30.0
"""Without a byte of the body, before a request is given up; its place is somebody else's."""
MOST_VALUES = 1 << 19
"""In a body, more or less: JSON of millions would keep the event loop for minutes, and everybody with it. Media are one
long text each."""


class Keys:
    """The keys that open the server. Digests are compared, in constant time, so that nothing is learned from time."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> bytes:
        """The digest of the key in an ``Authorization`` header.

        Raises:
            ApiError: 401, there is none, or it is not one of ours.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _locked("this server asks for a key; send it as Authorization: Bearer KEY")
        digest = _digest(key.strip())
        # All of them are compared, so that the time does not tell which.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise _locked("the key is not one of this server's")
        return digest


def _locked(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass
class Traffic:
    """How many requests do work now, and whether more are let in."""

    places: int
    """Requests that may do work at a time."""
    running: int = 0
    draining: bool = False
    """Set by whoever ends the server: new work is refused."""


class Gate:
    """ASGI middleware around the routes, inside of :class:`~aria.serve.exchange.ExchangeMiddleware`.

    Args:
        app: what is behind it.
        settings: keys and limits.
        metrics: counts what comes out.
        traffic: counted here.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, metrics: Metrics, traffic: Traffic):
        self._app = app
        self._traffic = traffic
        self._settings = settings
        self._metrics = metrics
        self._keys = Keys(settings.api_keys)
        self._by_client: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange: Exchange = scope["state"]["exchange"]
        scope = _normalized(scope)
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif exchange.method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._enter(scope, exchange, receive, watched)
        except ApiError as error:
            await error.response()(scope, receive, watched)
        except Exception:
            logger.exception("request %s failed: %s %s", exchange.request_id, scope["method"], scope["path"])
            if status:
                raise  # the client sees the connection break: half an answer is none
            await unexpected(exchange.request_id).response()(scope, receive, watched)
        finally:
            self._metrics.requests.labels(_route(scope), str(status or CLIENT_GONE)).inc()

    async def _enter(self, scope: Scope, exchange: Exchange, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        keyed = scope["path"].startswith(KEYED)
        client = (scope.get("client") or ("",))[0].encode()
        # A browser asks for permission (OPTIONS) without a key.
        if keyed and self._keys and scope["method"] != "OPTIONS":
            client = self._keys.check(headers.get("authorization"))
        exchange.client = client
        if scope["method"] != "POST" or not keyed:
            await self._app(scope, receive, send)
            return
        self._refuse(client)
        self._traffic.running += 1
        self._by_client[client] += 1
        try:
            await self._app(scope, self._body(headers, receive), send)
        finally:
            self._traffic.running -= 1
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]

    def _refuse(self, client: bytes) -> None:
        if self._traffic.draining:
            raise overloaded("the server is about to end; ask another one", wait=5)
        most = self._settings.max_concurrency_per_key
        if most is not None and self._by_client[client] >= most:
            raise overloaded(f"{most} requests at a time are allowed; wait for one of yours", status=429)
        if self._traffic.running >= self._traffic.places:
            raise overloaded("all places are taken, in the queue too; come again")

    def _body(self, headers: Headers, receive: Receive) -> Receive:
        """``receive`` that inflates a body, and ends at the limits of its size, before that and after it."""
        most = self._settings.max_body
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > most:
            raise _too_large(most)
        receive = _timed(receive)
        if is_compressed(headers):
            receive = inflated(_measured(receive, most, values=None))
        return _measured(receive, most, values=MOST_VALUES)


def _timed(receive: Receive) -> Receive:
    """``receive`` that gives up a body which stops."""
    complete = False

    async def timed() -> Message:
        nonlocal complete
        # Behind the body there is only the end of the connection to wait for, and that may come late.
        try:
            async with asyncio.timeout(None if complete else BODY_SECONDS):
                message = await receive()
        except TimeoutError:
            headers = {"Connection": "close"}
            raise ApiError(408, "the body stopped in the middle", code="body_timeout", headers=headers) from None
        complete = not message.get("more_body", False)
        return message

    return timed


def _measured(receive: Receive, most: int, values: int | None) -> Receive:
    """``receive`` that ends at a body's largest size in bytes, and in commas and brackets of its JSON."""
    taken, counted = 0, 0

    async def measured() -> Message:
        nonlocal taken, counted
        message = await receive()
        body = message.get("body", b"")
        taken += len(body)
        if taken > most:
            raise _too_large(most)
        if values is not None:
            counted += body.count(b",") + body.count(b"[") + body.count(b"{")
            if counted > values:
                told = f"the body has more than {values:,} commas and brackets, which this server does not take"
                raise ApiError(413, told, code="body_too_large", headers={"Connection": "close"})
        return message

    return measured


def _normalized(scope: Scope) -> Scope:
    """The scope of the same request without a slash at the end of its path, and of GET in place of HEAD."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}


def _too_large(most: int) -> ApiError:
    message = f"the body is larger than the {most:,} bytes that this server takes"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _route(scope: Scope) -> str:
    """The route's path, never the client's own: names of metrics are kept for ever."""
    route = scope.get("route")
    return getattr(route, "path", "other")


def open_to_strangers(host: str, keys: Sequence[str]) -> bool:
    """Whether a server at this address answers strangers without a key."""
    return not keys and host not in ("127.0.0.1", "localhost", "::1")
