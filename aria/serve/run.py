"""`run`: an app in uvicorn, which lets running requests finish before it ends."""

from __future__ import annotations

import asyncio
import copy
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from aria.serve.exchange import ACCESS_LOG
from aria.serve.limits import Traffic


class Server(uvicorn.Server):
    """uvicorn that, told to end, first refuses new work and waits for what runs; told twice, it ends at once."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, seconds: float, ready: Callable[[str], None]):
        super().__init__(config)
        self._traffic = traffic
        self._seconds = seconds
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None

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
        if self._traffic.draining or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._traffic.draining = True
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        end = asyncio.get_running_loop().time() + self._seconds
        while self._traffic.running and asyncio.get_running_loop().time() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        self.should_exit = True


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
    config = uvicorn.Config(
        app, host=host, port=port, log_level=log_level, access_log=False, log_config=_log_config(log_level, access_log),
        # What still runs after the drain is cancelled soon: its time is over.
        timeout_graceful_shutdown=1, server_header=False, ws="none",
        # Load balancers keep connections for a minute; who closes first should not be the server.
        timeout_keep_alive=75,
    )  # fmt: skip
    Server(config, app.state.traffic, app.state.service.settings.drain_seconds, ready).run()
