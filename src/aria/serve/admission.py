"""`AdmissionMiddleware`: host name and API key of every request, checked before any route."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aria.serve.active_requests import client_of
from aria.serve.errors import ApiError, unexpected
from aria.serve.metrics import ServerMetrics
from aria.serve.request_context import CLIENT_DISCONNECTED, RequestContext
from aria.serve.settings import ServerSettings

logger = logging.getLogger(__name__)

PROTECTED_PREFIXES = ("/v1/", "/tokenize", "/detokenize", "/metrics")
"""Prefixes of the paths that require a key, if keys are set."""
_HOST_HEADER = re.compile(r"(\[[0-9a-z:.%]+\]|[^\[\]:/@?#\s]+)(?::\d{0,5})?", re.IGNORECASE)


class ApiKeys:
    """The server's API keys. Their digests are compared in constant time."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> bytes:
        """Check the key in an ``Authorization`` header.

        Returns:
            Its digest.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("this server requires an API key; send it as Authorization: Bearer KEY")
        digest = _digest(key.strip())
        # All are compared, so that the time does not reveal which one matched.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise _unauthorized("the API key is wrong")
        return digest


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class AllowedHosts:
    """Host names that requests may use. A page of another site can point its own name at this server (DNS rebinding),
    and the browser then takes the server for that site; IP addresses cannot be abused in this way.

    Args:
        names: Names besides ``localhost``, its subdomains and IP addresses: ``aria.example``, ``*.example``, ``*``.
    """

    def __init__(self, names: Iterable[str]):
        self._names = {name.lower().rstrip(".") for name in ("localhost", "*.localhost", *names)}

    def check(self, headers: Headers) -> None:
        """Check a request's ``Host`` header.

        Raises:
            ApiError: 421, the name is not allowed; 400, the header is missing, repeated or malformed.
        """
        given = headers.getlist("host")
        if len(given) != 1 or not (match := _HOST_HEADER.fullmatch(given[0])):
            problem = f"is {given[0]!r:.100}" if len(given) == 1 else "is missing" if not given else "is repeated"
            raise ApiError(400, f"the header Host {problem}; expected the server's host name")
        name = match[1].lower().rstrip(".")
        parents = (f"*.{name[dot + 1 :]}" for dot, letter in enumerate(name) if letter == ".")
        if self._names.isdisjoint(("*", name, *parents)) and not _is_address(name):
            raise ApiError(
                421,
                f"{name!r:.100} is not an allowed host name of this server (header Host); --allowed-hosts allows it",
                code="host_not_allowed",
            )


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]").partition("%")[0])
    except ValueError:
        return False
    return True


class AdmissionMiddleware:
    """ASGI middleware around the routes, inside of :class:`~aria.serve.request_context.RequestContextMiddleware`.

    Args:
        app: The routes.
        settings: API keys and allowed host names.
        metrics: Counts responses.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, metrics: ServerMetrics):
        self._app = app
        self._metrics = metrics
        self._keys = ApiKeys(settings.api_keys)
        self._hosts = None if settings.api_keys and not settings.allowed_hosts else AllowedHosts(settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context: RequestContext = scope["state"]["context"]
        scope = _normalized(scope)
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif context.method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._enter(scope, context, receive, watched)
        except ApiError as error:
            await error.response()(scope, receive, watched)
        except Exception:
            logger.exception("request %s failed: %s %s", context.request_id, scope["method"], scope["path"])
            if status:
                raise  # the response has begun: the connection is closed
            await unexpected(context.request_id).response()(scope, receive, watched)
        finally:
            self._metrics.requests.labels(_route(scope), str(status or CLIENT_DISCONNECTED)).inc()

    async def _enter(self, scope: Scope, context: RequestContext, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None:
            self._hosts.check(headers)
        keyed = scope["path"].startswith(PROTECTED_PREFIXES)
        client = client_of((scope.get("client") or ("",))[0]).encode()
        # Browsers send preflight requests (OPTIONS) without a key.
        if keyed and self._keys and scope["method"] != "OPTIONS":
            client = self._keys.check(headers.get("authorization"))
        context.client = client
        await self._app(scope, receive, send)


def _normalized(scope: Scope) -> Scope:
    """The scope without a trailing slash in its path, and with GET in place of HEAD."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}


def _route(scope: Scope) -> str:
    """The route's path template, never the client's path: labels of metrics are never dropped."""
    route = scope.get("route")
    return getattr(route, "path", "other")


def allows_anonymous_access(host: str, keys: Sequence[str]) -> bool:
    """Whether other machines can use a server at this address without a key."""
    return not keys and host not in ("127.0.0.1", "localhost", "::1")
