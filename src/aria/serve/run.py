"""`run`: an app in uvicorn, within limits on its connections, which lets running requests finish before it ends."""

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
from aria.serve.exchange import ACCESS_LOG

try:
    import resource
except ImportError:  # Windows, where files are not limited
    resource = None  # type: ignore[assignment]

logger = logging.getLogger("uvicorn.error")

OTHER_FILES = 512
"""Open at a time beside connections: media, worker processes, weights."""
CUT_SECONDS = 1.0
"""That answers which are cut have to send their last event."""
EXIT_SECONDS = 3.0
"""That the process has to end by itself when nothing is answered any more. Threads may be at work inside of a library
that cannot be stopped, and Python would wait for them."""


class Server(uvicorn.Server):
    """uvicorn that, told to end, first refuses new work and waits for what runs; told twice, it ends at once.

    Args:
        config: for an app that :func:`~aria.serve.app.create_app` has made.
        ready: called with the address when the server listens.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None] = lambda _: None):
        super().__init__(config)
        self._traffic = config.app.state.traffic  # type: ignore[union-attr]
        self._seconds: float = config.app.state.service.settings.drain_seconds  # type: ignore[union-attr]
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchdog: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready(self._address())

    def _address(self) -> str:
        port = self.servers[0].sockets[0].getsockname()[1]
        # A browser cannot go to "every address".
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain first. It is not raised again at the end, as uvicorn does: this is a clean one."""
        if self._loop is None:
            self.force_exit = self.should_exit = True
        elif self._traffic.draining:
            os._exit(128 + sig)
        else:
            self._traffic.draining = True
            self._watch(self._seconds + CUT_SECONDS + EXIT_SECONDS)
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        self._traffic.drain()
        if not await self._idle(self._seconds):
            self._traffic.end_all(overloaded("the server ends before this answer does; ask another one", wait=5))
            await self._idle(CUT_SECONDS)
        self._watch(EXIT_SECONDS)
        self.should_exit = True

    async def _idle(self, seconds: float) -> bool:
        """Whether nobody waits for an answer any more within some seconds."""
        end = asyncio.get_running_loop().time() + seconds
        while self._traffic.active and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        return not self._traffic.active

    def _watch(self, seconds: float) -> None:
        """End the process after some seconds, whatever keeps it."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = threading.Timer(seconds, _give_up)
        self._watchdog.daemon = True
        self._watchdog.start()


def _give_up() -> None:
    names = ", ".join(sorted({thread.name for thread in threading.enumerate() if not thread.daemon}))
    logger.warning("the process ends although threads are still at work (%s)", names)
    os._exit(0)


def configure(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, log_level: str = "info", access_log: bool = True
) -> uvicorn.Config:
    """What uvicorn has to know; see :func:`run`."""
    settings = app.state.service.settings
    connections = Connections(settings, most=_files(settings.max_connections + OTHER_FILES) - OTHER_FILES)
    return uvicorn.Config(
        app, host=host, port=port, log_level=log_level, access_log=False, log_config=_log_config(log_level, access_log),
        # What still runs after the drain is cancelled soon: its time is over.
        timeout_graceful_shutdown=1, server_header=False, ws="none", proxy_headers=False,
        http=partial(Connection, connections),  # type: ignore[arg-type]
        timeout_keep_alive=settings.idle_seconds,
    )  # fmt: skip


def _files(count: int) -> int:
    """Let the process have so many files open, or as many as the system allows; how many that are."""
    if resource is None:
        return count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # macOS has a lower limit than it says
        most = soft
    if most < count:
        logger.warning(
            "this process may have %d files open, too few for %d connections; raise the limit (ulimit -n)",
            most, count - OTHER_FILES,
        )  # fmt: skip
    return max(most, OTHER_FILES + 16)


def _log_config(level: str, access_log: bool) -> dict[str, Any]:
    """uvicorn's logging, and the access log in its form."""
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
    """Serve until a signal ends it.

    Args:
        app: as :func:`~aria.serve.app.create_app` makes it.
        host: address to listen on.
        port: 0 takes any free one.
        log_level: uvicorn's: critical, error, warning, info, debug or trace.
        access_log: a line for each request on stderr, at the level info.
        ready: called with the server's address once it listens.
    """
    config = configure(app, host=host, port=port, log_level=log_level, access_log=access_log)
    # What is there now stays. To look through a million objects of PyTorch for garbage stops all threads, and bodies of
    # many values make that happen often.
    gc.collect()
    gc.freeze()
    Server(config, ready).run()
