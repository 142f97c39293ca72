"""Shutdown: running requests are finished or cancelled, and nothing keeps the process alive."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from aria.processor import MediaSettings
from aria.serve.run import Server
from aria.serve.settings import ServerSettings
from tests.helpers.media_site import site
from tests.helpers.raw_http import HEAD, is_closed, response
from tests.helpers.serving import Live, error_of, idle, running, until

HELLO = [{"role": "user", "content": "hello"}]
PATIENCE = 120
"""Seconds after which something counts as hung."""
ENDLESS = {"ignore_eos": True, "temperature": 2, "stream": True}
STREAMS = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3000, **ENDLESS},
    "/v1/completions": {"prompt": "hello", "max_tokens": 3000, **ENDLESS},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3000, **ENDLESS},
}


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers in threads shut down as in a process of their own, but do not end this process."""
    monkeypatch.setattr(Server, "_watch", lambda *_: None)


def end(live: Live) -> None:
    live.server.handle_exit(signal.SIGTERM, None)
    until(lambda: live.app.state.active_requests.draining)


@pytest.mark.parametrize("path", STREAMS)
def test_interrupted_streams_end_with_an_error(ending: None, path: str) -> None:
    with running(ServerSettings(drain_seconds=0.5)) as live:
        with live.http.stream("POST", path, json=STREAMS[path]) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            assert next(lines)
            end(live)
            refused = httpx2.post(f"{live.address}{path}", json=STREAMS[path])
            assert error_of(refused, 503)["code"] == "overloaded" and refused.headers["retry-after"]
            [error] = json.loads([*lines][-1].removeprefix("data: ")).values()
        assert (error["type"], error["code"]) == ("overloaded_error", "overloaded")
        assert "shutting down" in error["message"]
        until(lambda: live.app.state.active_requests.active == 0)
        until(idle)


def test_requests_that_wait_for_media_are_cancelled(ending: None) -> None:
    arrived, over = threading.Semaphore(0), threading.Event()

    def answer(handler: Any) -> None:
        arrived.release()
        over.wait(PATIENCE)

    media = MediaSettings.untrusted(private_addresses=True, read_timeout=PATIENCE, total_timeout=PATIENCE)
    settings = ServerSettings(drain_seconds=0.5, media=media)
    with site(answer) as address, running(settings) as live, ThreadPoolExecutor(4) as pool:
        shown = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]
        progress = {"stream": True, "stream_options": {"include_progress": True}}
        asked = [
            pool.submit(live.post, path, messages=shown, **more)
            for path in ("/v1/chat/completions", "/tokenize")
            for more in ({}, {"stream": True} if path == "/tokenize" else progress)
        ]
        for _ in asked:
            assert arrived.acquire(timeout=PATIENCE)
        end(live)
        for one in asked:
            answered = one.result(PATIENCE)
            # A stream that has begun with progress has the error as its last event.
            if answered.status_code != 503:
                [error] = json.loads(answered.text.rpartition("data: ")[2]).values()
                assert error["code"] == "overloaded"
        over.set()
        until(lambda: live.app.state.active_requests.running == 0)


def test_incomplete_bodies_are_refused_at_once(ending: None) -> None:
    with running(ServerSettings(drain_seconds=PATIENCE)) as live:
        with live.connect(HEAD + b"Content-Length: 100\r\n\r\n{") as slow:
            until(lambda: live.app.state.active_requests.active)
            end(live)
            status, headers, _ = response(slow)
            assert status == 503 and headers["retry-after"] and is_closed(slow)
        until(lambda: live.server.should_exit)


class Process:
    """A server in a process of its own that cannot exit by itself: a thread is stuck inside a library."""

    def __init__(self, code: str, *options: str):
        command = [sys.executable, "-c", code, "serve", "--port", "0", "--no-warm-up", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._timer = threading.Timer(300, self.process.kill)
        self._timer.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]  # type: ignore[index]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.process.kill()
        self.process.communicate()

    def ends(self) -> int:
        """The exit status, once the process has ended."""
        return self.process.wait(PATIENCE)


STUCK = """
import pathlib, time
from aria.cli import main
from aria.processor import AriaProcessor
def stuck(*_, **__):
    pathlib.Path({entered!r}).touch()
    time.sleep(3600)
AriaProcessor.prepare = stuck
main()
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a program can wait for")


@contextmanager
def stuck(folder: Path, *options: str) -> Iterator[tuple[Process, Any]]:
    """A server, and a request whose thread never returns."""
    entered = folder / "entered"
    with Process(STUCK.format(entered=str(entered)), *options) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx2.post, f"{server.address}/tokenize", json={"messages": HELLO}, timeout=PATIENCE)
        until(entered.exists)
        yield server, asked


@pytest.mark.slow
@posix
def test_a_stuck_thread_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    with stuck(tmp_path, "--drain-seconds", "1") as (server, asked):
        server.process.send_signal(signal.SIGTERM)
        assert error_of(asked.result(), 503)["code"] == "overloaded"
        assert server.ends() == 0
        assert "threads are still running" in server.process.stderr.read()


@pytest.mark.slow
@posix
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with stuck(tmp_path, "--drain-seconds", "3600") as (server, asked):
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{server.address}/ready").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.ends() == 128 + signal.SIGTERM
        with pytest.raises(httpx2.HTTPError):
            asked.result()


@posix
@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_child_process_outlives_the_server(tmp_path: Path, number: signal.Signals) -> None:
    with stuck(tmp_path, "--drain-seconds", "1", "--media-workers", "2") as (server, _):
        others = psutil.Process(server.process.pid).children(recursive=True)
        assert others, "media workers"
        server.process.send_signal(number)
        server.ends()
        until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in others))


@pytest.mark.slow
@posix
def test_sigterm_lets_running_answers_finish(tmp_path):
    drained = tmp_path / "drained"
    # The response cannot end before the test has seen what others get.
    code = f"""
import pathlib, time
from aria.cli import main
from aria.engine import Engine
step, steps = Engine.step, 0
def held(self):
    global steps
    steps += 1
    while steps > 5 and not pathlib.Path({str(drained)!r}).exists():
        time.sleep(0.01)
    return step(self)
Engine.step = held
main()
"""
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--api-key", "key"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(300, process.kill)
    timer.start()
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        headers = {"Authorization": "Bearer key"}
        body = {"messages": HELLO, "max_tokens": 20, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=body, headers=headers, timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            assert _until_not_ready(address) == 503, "new requests are refused while one is running"
            drained.touch()
            rest = list(lines)
        said = [json.loads(line[6:])["choices"][0] for line in [first, *rest] if line != "data: [DONE]"]
        assert rest[-1] == "data: [DONE]"
        assert said[-1]["finish_reason"] == "length"
        assert process.wait(120) == 0, process.stderr.read()
    finally:
        timer.cancel()
        process.kill()


def _until_not_ready(address: str) -> int:
    status = 200
    while status == 200:
        status = httpx2.get(f"{address}/ready").status_code
        time.sleep(0.01)
    return status
