"""`Exchange`: one request and its response, as the access log reports it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from urllib.parse import quote

ACCESS_LOG = "aria.access"
"""Name of the logger that has a line for each request, at the level INFO."""
_logger = logging.getLogger(ACCESS_LOG)


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
            status: of the response; 499 where the client left before it.
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
