"""A server with nano on a local port, in a thread, and clients of it, for the tests of `aria.serve`."""

from __future__ import annotations

import asyncio
import base64
import functools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
from fastapi import FastAPI

from aria.engine import AsyncEngine, Result, SamplingParams
from aria.serve.app import create_app
from aria.serve.run import Server, configure
from aria.serve.settings import ServerSettings

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


@functools.cache
def engine() -> AsyncEngine:
    """Nano, shared by all tests of a run."""
    return AsyncEngine(max_batch=8, cache_tokens=16_384, device="cpu")


class Live:
    """A running server and clients of it."""

    def __init__(self, app: FastAPI, server: Server, key: str):
        self.app = app
        self.server = server
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.http = httpx2.Client(base_url=self.address, timeout=60, headers={"Authorization": f"Bearer {key}"})
        self.openai = openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Open a bare connection and send ``sent``."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(sent)
        return connection

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """Post a body without a client's own checks."""
        return self.http.post(path, json=body)

    def chat(self, content: Any = "hello", **fields: Any) -> Any:
        """Ask one question, answered greedily."""
        said = [{"role": "user", "content": content}]
        return self.openai.chat.completions.create(
            **{"model": "aria-nano", "messages": said, "temperature": 0, "max_tokens": 64, **fields}
        )


@contextmanager
def running(settings: ServerSettings | None = None, key: str = "none") -> Iterator[Live]:
    """Run a server until the block ends. Servers share the engine, so its media settings are restored afterwards."""
    media = engine().engine.processor.media
    app = create_app(engine(), settings)
    server = Server(configure(app, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Live(app, server, key)
    finally:
        engine().engine.processor.media = media
        server.should_exit = True
        thread.join(10)


def until(holds: Any, seconds: float = 120.0) -> None:
    """Wait until a condition holds, at most ``seconds``."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.01)


def idle() -> bool:
    """Return whether the engine has no requests."""
    stats = engine().stats()
    return stats.running == stats.waiting == 0


def straight(messages: list[dict[str, Any]], **params: Any) -> Result:
    """Return the engine's own answer."""
    return asyncio.run(engine().chat(messages, SamplingParams(**{"max_tokens": 64, **params})))


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """Return a data: URI, as clients send media."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


HELLO = [{"role": "user", "content": "hello"}]
LONG = {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True, "temperature": 2}


def error_of(response, status: int) -> dict:
    """Return the error object after checking its format."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    [error] = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    return error
