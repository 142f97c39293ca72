"""The server under attack: the cost of hostile requests to other clients.

    python -m bench.server.hostile --media 1000 --minutes 5

Each attack runs beside good clients, whose answers are compared with earlier ones, while `/health` is requested twenty
times per second and the memory of all processes is sampled; the server may use 6 GB. Attackers and files come from
`tests/hostile`. The last line is JSON. The exit status is 1 if the server died, a good answer was wrong or lost, the
99th percentile of `/health` exceeded 100 ms, the main process used 300 MB more than idle for one request, or the 99th
percentile of good answers more than doubled beside hostile files. (A hundred attackers of all kinds on the same machine
use its CPU themselves, so their row is only reported.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench import measure
from tests.helpers.repository import environment
from tests.hostile.bad_media import catalog, plan
from tests.hostile.killers import KILLERS
from tests.hostile.server import Outcome, Server, Watched, attack, milliseconds, percentile, post, running, watching

LIMITS = ("--image-seconds", "20", "--decode-seconds", "20")
PEAK = 300 << 20
HEALTH_SECONDS = 0.1
COLUMNS = ("attack", "answers", "longest s", "/health p50, p99 ms", "good answers", "p50, p99 ms", "main MB", "all MB")


class Bench:
    """Attacks a server and collects a row for each attack.

    Args:
        server: The server.
        clients: Number of good clients beside each attack.

    Attributes:
        rows: Rows of the table.
        found: The same results as JSON.
        faults: Failed criteria, a sentence each.
    """

    def __init__(self, server: Server, clients: int):
        self._server, self._clients = server, clients
        self.rows: list[Sequence[str]] = []
        self.found: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self._without = 0.0

    def run(
        self,
        name: str,
        work: Callable[[], list[Outcome]],
        *,
        expected: Sequence[int],
        peak: int | None,
        slower: bool = False,
    ) -> None:
        """Attack, and add a row.

        Args:
            name: Name of the attack.
            work: The attack itself.
            expected: Statuses that hostile requests may get.
            peak: Limit on bytes of the main process beyond idle.
            slower: Good answers may take longer than twice as long.
        """
        if not self._server.alive:
            self.faults.append(f"{name}: skipped, since the server had died")
            return
        with watching(self._server, self._clients) as watched:
            outcomes = work()
        statuses = Counter(outcome.status for outcome in outcomes)
        longest = max((outcome.seconds for outcome in outcomes), default=0.0)
        self._judge(name, statuses, watched, expected, peak, slower)
        health, good = ([milliseconds(one, part) for part in (0.5, 0.99)] for one in (watched.health, watched.good))
        row = (
            name, ", ".join(f"{count} x {status}" for status, count in statuses.items()), f"{longest:.1f}",
            f"{health[0]}, {health[1]}", f"{len(watched.good)}, {len(watched.wrong)} wrong", f"{good[0]}, {good[1]}",
            f"{watched.peak >> 20}", f"{watched.whole >> 20}",
        )  # fmt: skip
        print(*row, sep=" | ", flush=True)
        self.rows.append(row)
        found = {"statuses": statuses, "longest": longest, "health_ms": health, "good_ms": good}
        answers = {"good": len(watched.good), "wrong": len(watched.wrong)}
        self.found.append({"attack": name, **found, **answers, "main_bytes": watched.peak, "all_bytes": watched.whole})

    def _judge(
        self,
        name: str,
        statuses: Counter[int],
        watched: Watched,
        expected: Sequence[int],
        peak: int | None,
        slower: bool,
    ) -> None:
        slowest = percentile(watched.good, 0.99)
        self._without = self._without or slowest
        missed = {
            "the server died": not self._server.alive,
            f"good answers were wrong or lost, such as {watched.wrong[:1]}": bool(watched.wrong),
            f"/health was {dict(watched.unhealthy)}": bool(watched.unhealthy),
            f"unexpected answers: {dict(statuses)}": bool(set(statuses) - set(expected)),
            "/health was slow": percentile(watched.health, 0.99) > HEALTH_SECONDS,
            "good answers took more than twice as long": not slower and slowest > 2 * self._without,
            "the main process took too much memory": peak is not None and watched.peak > peak,
        }
        self.faults += [f"{name}: {what}" for what, is_missed in missed.items() if is_missed]


def idle(seconds: float) -> list[Outcome]:
    """Wait without an attack."""
    time.sleep(seconds)
    return []


def together(port: int, requests: list[bytes]) -> list[Outcome]:
    """Send requests at the same time."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda body: post(port, body), requests))


def mixed(port: int, seconds: float) -> list[Outcome]:
    """Run all attackers together, and print their results."""
    command = [sys.executable, "-m", "tests.hostile.attackers", str(port), str(seconds), "1"]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout.strip())
    seen = json.loads(done.stdout)["statuses"]
    # -1 and 0 are connections that attackers or the server closed.
    return [
        Outcome(name, int(status), 0.0, "")
        for name, counts in seen.items()
        for status, count in counts.items()
        for _ in range(count if int(status) > 0 else 0)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all attacks and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=int, default=1000, help="number of hostile media, sent 16 at a time")
    parser.add_argument("--minutes", type=float, default=5, help="duration of all attackers together")
    parser.add_argument("--clients", type=int, default=8, help="good clients beside each attack")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as kept, running(*LIMITS) as server:
        bench, port = Bench(server, arguments.clients), server.port
        bench.run("none", partial(idle, 30), expected=(), peak=PEAK)
        for name, killer in KILLERS.items():
            bench.run(name, partial(together, port, killer.make()), expected=killer.statuses, peak=PEAK)
        if arguments.media:
            media = plan(arguments.media, list(catalog().values()))
            name = f"{arguments.media:,} hostile media, 16 at a time"
            bench.run(name, partial(attack, port, media, Path(kept)), expected=(200, 400, 503), peak=None)
        if arguments.minutes:
            expected = (100, 200, 400, 404, 405, 408, 411, 413, 421, 426, 429, 431, 501, 503, 505)
            name = f"{arguments.minutes:g} minutes of all attackers"
            bench.run(name, partial(mixed, port, 60 * arguments.minutes), expected=expected, peak=None, slower=True)
    print(measure.table(bench.rows, COLUMNS))
    for fault in bench.faults:
        print(fault)
    measure.report({"rows": bench.found, "faults": bench.faults}, arguments.json)
    if bench.faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
