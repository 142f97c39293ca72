"""`run`: the app in uvicorn, with limits on connections and a graceful shutdown."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from aria.serve.connections import Connection, Connections
from aria.serve.errors import overloaded
from aria.serve.request_context import ACCESS_LOG

try:
    import resource
except ImportError:  # Windows, where files are not limited
    resource = None  # type: ignore[assignment]

logger = logging.getLogger("uvicorn.error")

OTHER_FILES = 512
"""Open files besides connections: media, worker processes, weights."""
CUT_SECONDS = 1.0
"""Time for interrupted responses to send their last event."""
EXIT_SECONDS = 3.0
"""Time for the process to exit by itself once all requests are done. Python waits for threads, which may be inside a
library call that cannot be interrupted."""


class Server(uvicorn.Server):
    """A uvicorn server that drains requests on the first signal and exits at once on the second.

    Args:
        config: uvicorn's configuration of an app from :func:`~aria.serve.app.create_app`.
        ready: Called with the address once the server listens.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None] = lambda _: None):
        super().__init__(config)
        self._active_requests = config.app.state.active_requests  # type: ignore[union-attr]
        self._seconds: float = config.app.state.service.settings.drain_seconds  # type: ignore[union-attr]
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchdog: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then report the address."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready(self._address())

    def _address(self) -> str:
        port = self.servers[0].sockets[0].getsockname()[1]
        # Browsers cannot open the wildcard address.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on a signal. Unlike in uvicorn the signal is not raised again at the end, so the exit status is 0."""
        if self._loop is None:
            self.force_exit = self.should_exit = True
        elif self._active_requests.draining:
            os._exit(128 + sig)
        else:
            self._active_requests.draining = True
            self._watch(self._seconds + CUT_SECONDS + EXIT_SECONDS)
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        self._active_requests.drain()
        if not await self._idle(self._seconds):
            self._active_requests.cancel_all(
                overloaded("the server is shutting down before this request is finished; use another one", wait=5)
            )
            await self._idle(CUT_SECONDS)
        self._watch(EXIT_SECONDS)
        self.should_exit = True

    async def _idle(self, seconds: float) -> bool:
        """Wait up to some seconds until no client waits any more; whether that is so."""
        end = asyncio.get_running_loop().time() + seconds
        while self._active_requests.active and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        return not self._active_requests.active

    def _watch(self, seconds: float) -> None:
        """End the process after some seconds, whatever it is doing."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = threading.Timer(seconds, _give_up)
        self._watchdog.daemon = True
        self._watchdog.start()


def _give_up() -> None:
    names = ", ".join(sorted({thread.name for thread in threading.enumerate() if not thread.daemon}))
    logger.warning("exiting while threads are still running (%s)", names)
    os._exit(0)


def configure(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, log_level: str = "info", access_log: bool = True
) -> uvicorn.Config:
    """uvicorn's configuration; see :func:`run`."""
    settings = app.state.service.settings
    connections = Connections(settings, most=_files(settings.max_connections + OTHER_FILES) - OTHER_FILES)
    return uvicorn.Config(
        app, host=host, port=port, log_level=log_level, access_log=False, log_config=_log_config(log_level, access_log),
        # What still runs after the drain is cancelled soon.
        timeout_graceful_shutdown=1, server_header=False, ws="none", proxy_headers=False,
        http=partial(Connection, connections),  # type: ignore[arg-type]
        timeout_keep_alive=settings.idle_seconds,
    )  # fmt: skip


def _files(count: int) -> int:
    """Raise the limit on open files as far as needed and allowed; returns the number of files."""
    if resource is None:
        return count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # macOS reports a higher limit than it has
        most = soft
    if most < count:
        logger.warning(
            "the limit of %d open files is too low for %d connections; raise it (ulimit -n)",
            most, count - OTHER_FILES,
        )  # fmt: skip
    return max(most, OTHER_FILES + 16)


def _log_config(level: str, access_log: bool) -> dict[str, Any]:
    """uvicorn's logging configuration, with the access log added."""
    if level not in uvicorn.config.LOG_LEVELS:
        raise ValueError(f"the log level is {level!r}; expected one of {', '.join(uvicorn.config.LOG_LEVELS)}")
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["formatters"]["access"] = {"format": "%(asctime)s %(message)s"}
    config["handlers"]["access"] = {
        "formatter": "access",
        "class": "logging.StreamHandler",
        "stream": "ext://sys.stderr",
    }
    chosen = uvicorn.config.LOG_LEVELS[level] if access_log else logging.CRITICAL
    config["loggers"][ACCESS_LOG] = {"handlers": ["access"], "level": chosen, "propagate": False}
    return config


def run(
    app: FastAPI, *, host: str, port: int, log_level: str, access_log: bool = True, ready: Callable[[str], None]
) -> None:
    """Serve until a signal arrives.

    Args:
        app: The app from :func:`~aria.serve.app.create_app`.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        log_level: critical, error, warning, info, debug or trace.
        access_log: Whether to log one line per request to stderr, at level info.
        ready: Called with the server's address once it listens.
    """
    config = configure(app, host=host, port=port, log_level=log_level, access_log=access_log)
    # Exclude the objects that exist now from garbage collection: scanning a million objects of PyTorch stops all
    # threads, and large request bodies trigger it often.
    gc.collect()
    gc.freeze()
    Server(config, ready).run()
