"""Many hostile requests for minutes: legitimate clients are served, and nothing is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from aria.media.limits import MediaSettings
from tests.helpers.repository import environment
from tests.hostile import attackers
from tests.hostile.bad_drawings import nested_forms
from tests.hostile.bad_images import LARGEST, tiny_webp
from tests.hostile.bad_media import catalog, plan
from tests.hostile.server import (
    PEAK,
    Server,
    State,
    Watched,
    asking,
    attack,
    eventually,
    percentile,
    post,
    running,
    runs,
    watching,
)

pytestmark = pytest.mark.soak

MEDIA = int(os.environ.get("ARIA_HOSTILE_MEDIA", "1000"))
SECONDS = float(os.environ.get("ARIA_HOSTILE_SECONDS", "300"))
BODIES = 256 << 20
LIMITS = ("--image-seconds", "20", "--decode-seconds", "20", "--held-body-bytes", str(BODIES))
KEPT = PEAK + BODIES + MediaSettings().cache_bytes
"""Bytes that the main process may take beyond idle, with the bodies, clips and pages that it keeps within budgets."""
SLOWER = 10
"""How many times longer good answers may take beside an attack; `bench/server/hostile.py` measures less than twice."""


def check(server: Server, before: Watched, watched: Watched) -> None:
    report = f"without: {before.report()}\nbeside: {watched.report()}"
    print(report)
    assert server.alive, server.said()
    assert not watched.wrong, watched.wrong[:5]
    assert not watched.unhealthy, watched.unhealthy
    assert watched.peak < KEPT, report
    assert percentile(watched.health, 0.99) < 1, report
    assert percentile(watched.good, 0.99) < SLOWER * percentile(before.good, 0.99), report


def used(server: Server) -> State:
    """What a server holds that has answered questions of every kind and has nothing to do."""
    time.sleep(2)
    return server.state()


def returned(server: Server, before: State) -> bool:
    """Whether it holds no more than before. Threads of pools stay, as do the connections of who watches."""
    now = server.state()
    return (
        now.files <= before.files + 16
        and now.threads <= before.threads + 24
        and now.children <= before.children + 2
        and now.scratch <= before.scratch
        and now.memory < before.memory + KEPT
    )


def test_a_thousand_hostile_media_cost_good_clients_little(folder: Path) -> None:
    with running(*LIMITS) as server:
        with watching(server, clients=8) as before:
            time.sleep(15)
        idle = used(server)
        media = plan(MEDIA, list(catalog().values()))
        with watching(server, clients=8) as watched:
            outcomes = attack(server.port, media, folder, together=16)
        print(Counter(outcome.status for outcome in outcomes))
        check(server, before, watched)
        for (medium, _), outcome in zip(media, outcomes, strict=True):
            # A 503 says that memory for media is short, and when to come again.
            assert outcome.status in ((400, 503) if medium.refused else (200, 400, 503)), outcome
        assert eventually(lambda: returned(server, idle), 60), (idle, server.state())


def test_minutes_of_attacks_of_every_kind_leave_nothing_behind() -> None:
    with running(*LIMITS, "--header-seconds", "5", "--body-seconds", "20") as server:
        with watching(server, clients=4) as before:
            time.sleep(15)
        idle = used(server)
        command = [sys.executable, "-m", attackers.__name__, str(server.port), str(SECONDS), "1"]
        with watching(server, clients=4) as watched:
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        print(done.stdout)
        check(server, before, watched)
        assert not json.loads(done.stdout)["faults"], done.stdout
        assert eventually(lambda: returned(server, idle), 60), (idle, server.state())
        assert server.stop() == 0
        assert server.files() == []


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_the_end_of_a_server_ends_what_it_decodes(ending: signal.Signals) -> None:
    drain = 2
    bodies = [asking("document", nested_forms(Random(n), 9, 10)) for n in range(3)]
    bodies += [asking("image", tiny_webp(LARGEST, LARGEST - n), times=3) for n in range(3)]
    with running("--drain-seconds", str(drain)) as server, ThreadPoolExecutor(len(bodies)) as pool:
        sent = [pool.submit(post, server.port, body) for body in bodies]
        assert eventually(lambda: len(server.children()) > 1, 30)
        time.sleep(1)
        children = server.children()
        began = time.monotonic()
        status = server.stop(ending, seconds=drain + 15)
        seconds = time.monotonic() - began
        assert status == (0 if ending == signal.SIGTERM else -signal.SIGKILL), (status, server.said())
        assert seconds < drain + 10
        for outcome in (future.result() for future in sent):
            assert outcome.status in (0, 400, 503), outcome
        assert eventually(lambda: not any(map(runs, children)), 10), children
        if ending == signal.SIGTERM:
            assert server.files() == []


def test_those_who_leave_end_what_was_decoded_for_them() -> None:
    """Do not wait for a deadline of minutes."""
    with running("--decode-seconds", "600") as server:
        body = asking("document", nested_forms(Random(1), 5, 100))
        threads = [threading.Thread(target=post, args=(server.port, body), kwargs={"seconds": 2}) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        main = server.main.cpu_times()
        assert eventually(lambda: all(child.cpu_percent(0.3) < 5 for child in server.children()), 10)
        assert server.main.cpu_times().user - main.user < 5
