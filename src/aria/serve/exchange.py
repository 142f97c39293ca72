"""`Exchange`: one request and its response, and `ExchangeMiddleware`, which names it and writes the access log."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACCESS_LOG = "aria.access"
"""Name of the logger that has a line for each request, at the level INFO."""
CLIENT_GONE = 499
"""Status of a request whose client left before the response; nobody but logs and metrics see it."""
_logger = logging.getLogger(ACCESS_LOG)
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass
class Exchange:
    """One HTTP request while it is answered. Whoever knows more about it writes it here."""

    method: str = ""
    path: str = ""
    request_id: str = ""
    client: bytes = b""
    """Digest of the key; the address, where no keys are asked for."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    began: float = field(default_factory=time.perf_counter)

    def log(self, status: int) -> None:
        """The line of the access log. It has nothing of bodies, queries, keys and headers.

        Args:
            status: of the response, or :data:`CLIENT_GONE`.
        """
        if not _logger.isEnabledFor(logging.INFO):
            return
        tokens = [
            f" {name}={count}"
            for name, count in (("prompt", self.prompt_tokens), ("completion", self.completion_tokens))
            if count is not None
        ]
        # Quoted, because a path may hold line ends.
        _logger.info(
            "%s %s %d %.3fs%s id=%s",
            self.method, quote(self.path[:200]), status, time.perf_counter() - self.began, "".join(tokens),
            self.request_id,
        )  # fmt: skip


class ExchangeMiddleware:
    """ASGI middleware around everything else: ``scope["state"]["exchange"]``, the header ``X-Request-Id``, which is the
    client's own if it is harmless, and the access log."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        name = asked if _ID.fullmatch(asked) else f"req-{uuid.uuid4().hex}"
        exchange = Exchange(scope["method"], scope["path"], name)
        status = CLIENT_GONE

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app({**scope, "state": {**scope.get("state", {}), "exchange": exchange}}, receive, named)
        finally:
            exchange.log(status)
