"""`RequestContext`: id, client and token counts of a request; its middleware sets the id and writes the access log."""

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
"""Logger of one line per request, at level INFO."""
CLIENT_DISCONNECTED = 499
"""Status of a request whose client disconnected before the response, in logs and metrics only."""
_logger = logging.getLogger(ACCESS_LOG)
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass
class RequestContext:
    """An HTTP request while it is answered; handlers add what they learn about it."""

    method: str = ""
    path: str = ""
    request_id: str = ""
    client: bytes = b""
    """Digest of the API key, or the address if no keys are required."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    began: float = field(default_factory=time.perf_counter)

    def log(self, status: int) -> None:
        """Write the access log line, without bodies, queries, keys or headers.

        Args:
            status: Status of the response, or :data:`CLIENT_DISCONNECTED`.
        """
        if not _logger.isEnabledFor(logging.INFO):
            return
        tokens = [
            f" {name}={count}"
            for name, count in (("prompt", self.prompt_tokens), ("completion", self.completion_tokens))
            if count is not None
        ]
        # Quoted, since a path may contain newlines.
        _logger.info(
            "%s %s %d %.3fs%s id=%s",
            self.method, quote(self.path[:200]), status, time.perf_counter() - self.began, "".join(tokens),
            self.request_id,
        )  # fmt: skip


class RequestContextMiddleware:
    """Outermost ASGI middleware: ``scope["state"]["context"]``, the access log, and the header ``X-Request-Id``, which
    repeats the client's own if it is well-formed."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        context = RequestContext(scope["method"], scope["path"], name)
        status = CLIENT_DISCONNECTED

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app({**scope, "state": {**scope.get("state", {}), "context": context}}, receive, named)
        finally:
            context.log(status)
