"""What every request passes before a route sees it: the name that it calls the server by, and a key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aria.serve.errors import ApiError, unexpected
from aria.serve.exchange import CLIENT_GONE, Exchange
from aria.serve.metrics import Metrics
from aria.serve.settings import ServerSettings
from aria.serve.traffic import client_of

logger = logging.getLogger(__name__)

KEYED = ("/v1/", "/tokenize", "/detokenize", "/metrics")
"""Beginnings of the routes that need a key, where there are keys."""
_HOST_HEADER = re.compile(r"(\[[0-9a-z:.%]+\]|[^\[\]:/@?#\s]+)(?::\d{0,5})?", re.IGNORECASE)


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


class Hosts:
    """Names that a server may be called by. A page of another site may make its own name lead here (DNS rebinding), and
    its browser takes the server for that site then; an address is nobody's to make so.

    Args:
        names: beside ``localhost``, names under it, and addresses: ``aria.example``, ``*.example``, ``*``.
    """

    def __init__(self, names: Iterable[str]):
        self._names = {name.lower().rstrip(".") for name in ("localhost", "*.localhost", *names)}

    def check(self, headers: Headers) -> None:
        """Look at a request's ``Host``.

        Raises:
            ApiError: 421, it is none of the names; 400, there is none or several.
        """
        given = headers.getlist("host")
        if len(given) != 1 or not (match := _HOST_HEADER.fullmatch(given[0])):
            said = f"is {given[0]!r:.100}" if len(given) == 1 else "is missing" if not given else "is there twice"
            raise ApiError(400, f"the header Host {said}; expected the name that the server is called by")
        name = match[1].lower().rstrip(".")
        parents = (f"*.{name[dot + 1 :]}" for dot, letter in enumerate(name) if letter == ".")
        if self._names.isdisjoint(("*", name, *parents)) and not _is_address(name):
            raise ApiError(
                421,
                f"{name!r:.100} is not a name of this server (header Host); whoever runs it can allow it with "
                "--allowed-hosts",
                code="host_not_allowed",
            )


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]").partition("%")[0])
    except ValueError:
        return False
    return True


class Gate:
    """ASGI middleware around the routes, inside of :class:`~aria.serve.exchange.ExchangeMiddleware`.

    Args:
        app: what is behind it.
        settings: keys and host names.
        metrics: counts what comes out.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, metrics: Metrics):
        self._app = app
        self._metrics = metrics
        self._keys = Keys(settings.api_keys)
        self._hosts = None if settings.api_keys and not settings.allowed_hosts else Hosts(settings.allowed_hosts)

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
        if self._hosts is not None:
            self._hosts.check(headers)
        keyed = scope["path"].startswith(KEYED)
        client = client_of((scope.get("client") or ("",))[0]).encode()
        # A browser asks for permission (OPTIONS) without a key.
        if keyed and self._keys and scope["method"] != "OPTIONS":
            client = self._keys.check(headers.get("authorization"))
        exchange.client = client
        await self._app(scope, receive, send)


def _normalized(scope: Scope) -> Scope:
    """The scope of the same request without a slash at the end of its path, and of GET in place of HEAD."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}


def _route(scope: Scope) -> str:
    """The route's path, never the client's own: names of metrics are kept for ever."""
    route = scope.get("route")
    return getattr(route, "path", "other")


def open_to_strangers(host: str, keys: Sequence[str]) -> bool:
    """Whether a server at this address answers strangers without a key."""
    return not keys and host not in ("127.0.0.1", "localhost", "::1")
