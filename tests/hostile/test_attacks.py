"""A malicious request costs only its sender."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hostile.bad_schemas import bodies
from tests.hostile.killers import KILLERS
from tests.hostile.leading import leading
from tests.hostile.server import PEAK, Server, Watched, asking, eventually, percentile, post, running, watching

HEALTH_SECONDS = 1.0
"""For 99 of 100 responses of /health: far more than `bench/server/hostile.py` measures, far less than what hangs."""


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files clients may reference."""
    return tmp_path_factory.mktemp("readable")


@pytest.fixture(scope="module")
def server(readable: Path) -> Iterator[Server]:
    with running("--allow-local", str(readable), "--allow-private-addresses") as server:
        yield server


def check(server: Server, watched: Watched) -> None:
    """Only the attacker was affected."""
    report = watched.report()
    print(report)
    assert server.alive, server.said()
    assert not watched.wrong, watched.wrong[:5]
    assert not watched.unhealthy, watched.unhealthy
    assert watched.peak < PEAK, report
    assert percentile(watched.health, 0.99) < HEALTH_SECONDS, report


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if killer.slow else name for name, killer in KILLERS.items()]
)
def test_requests_that_once_crashed_the_server_affect_nobody_else(server: Server, name: str) -> None:
    killer = KILLERS[name]
    requests = killer.make()
    with watching(server, clients=2) as watched, ThreadPoolExecutor(len(requests)) as pool:
        outcomes = list(pool.map(lambda body: post(server.port, body), requests))
    check(server, watched)
    for outcome in outcomes:
        assert outcome.status in killer.statuses, outcome
        assert outcome.seconds < killer.seconds, outcome


@pytest.mark.soak
def test_hostile_schemas_are_followed_or_refused(server: Server) -> None:
    made = bodies()
    with watching(server, clients=2) as watched, ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda name: post(server.port, made[name], name), made))
    check(server, watched)
    for outcome in outcomes:
        assert outcome.status in (200, 400, 413), outcome
        assert outcome.seconds < 60, outcome


def test_no_medium_leads_to_another_file_or_address(server: Server, readable: Path) -> None:
    """Not even files that clients may reference directly."""
    pipe = readable / "secret.mp4"
    os.mkfifo(pipe)
    reached: list[str] = []
    done = threading.Event()

    def watch_pipe() -> None:
        # Opening a pipe for reading waits for a writer, and a writer fails until then.
        while not done.wait(0.001):
            try:
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                continue
            reached.append("file")

    def watch_port() -> None:
        while not done.is_set():
            try:
                listener.accept()[0].close()
            except TimeoutError:
                continue
            reached.append("address")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        threads = [threading.Thread(target=watch) for watch in (watch_pipe, watch_port)]
        for thread in threads:
            thread.start()
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
            media = leading(pipe, address)
            with ThreadPoolExecutor(4) as pool:
                sent = {name: pool.submit(post, server.port, asking(*one), name) for name, one in media.items()}
            for name, outcome in sent.items():
                expected = (200, 400) if name.startswith("document/") else (400,)
                assert outcome.result().status in expected, outcome.result()
            assert not reached
            # What clients name themselves is reached, so that the watchers would have seen it.
            part = {"type": "image_url", "image_url": {"url": address}}
            said = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
            assert post(server.port, said).status == 400
            os.close(os.open(pipe, os.O_RDONLY))
            assert eventually(lambda: set(reached) == {"file", "address"}, 10)
        finally:
            done.set()
            for thread in threads:
                thread.join()
