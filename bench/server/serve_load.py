"""Load test of the server: many concurrent clients for minutes, some of which disconnect.

    python -m bench.server.serve_load --minutes 10 --clients 64

Every answer is compared with the engine's own for the same prompt and seed. `/health` is requested five times per
second, and the server's memory is sampled. The last line is JSON; the exit status is 1 if an answer was wrong or
refused, or if work continued after clients had disconnected.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from aria import Engine, SamplingParams
from bench import measure
from bench.server.client import Reply, ask
from bench.server.process import ROOT, served

IMAGES = ROOT / "examples" / "pictures"
TEXTS = ("hello", "who are you?", "What is a triangle?", "thank you", "good morning", "Can you read?")
SCHEMA = {
    "type": "object",
    "properties": {"round": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["round", "size"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Item:
    """A request body and the engine's answer to it."""

    body: Mapping[str, Any]
    text: str
    finish_reason: str


@dataclass
class Seen:
    """Observations of the test."""

    answered: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    health: list[float] = field(default_factory=list)
    """Seconds of each `/health` request."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and resident bytes."""


def items() -> list[Item]:
    """Make requests with text, images and JSON schemas, greedy and sampled, and answer them with an engine."""
    engine = Engine(device="cpu")
    asked: list[tuple[Any, Any, dict[str, Any]]] = []
    for seed, text in enumerate(TEXTS):
        said = [{"role": "user", "content": text}]
        asked += [(said, said, {}), (said, said, {"temperature": 0.8, "seed": seed})]
    for file in sorted(IMAGES.glob("*.png")):
        data = file.read_bytes()
        url = {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}", "detail": "low"}
        question = {"type": "text", "text": "What is in this picture?"}
        size = min(engine.processor.image_processor.sizes)
        ours = [{"type": "image", "image": data, "max_image_size": size}, question]
        sent = [{"type": "image_url", "image_url": url}, question]
        asked.append(([{"role": "user", "content": ours}], [{"role": "user", "content": sent}], {}))
    found = []
    for ours, sent, fields in asked:
        fields = {"temperature": 0.0, "max_tokens": 64, **fields}
        result = engine.chat([ours], SamplingParams(**fields))[0]
        found.append(Item({"messages": sent, **fields}, result.text, result.finish_reason))
    ball = [{"role": "user", "content": "Describe a ball."}]
    form = {"type": "json_schema", "json_schema": {"name": "ball", "schema": SCHEMA}}
    fields = {"temperature": 0.0, "max_tokens": 64}
    result = engine.chat([ball], SamplingParams(**fields, json_schema=SCHEMA))[0]
    found.append(Item({"messages": ball, "response_format": form, **fields}, result.text, result.finish_reason))
    return found


async def client(port: int, known: Sequence[Item], seen: Seen, end: float, chance: random.Random) -> None:
    """Send requests until the end; disconnect from some."""
    while time.monotonic() < end:
        item = chance.choice(known)
        stream = chance.random() < 0.67
        leaves = chance.random() < 1 / 3
        body = {**item.body, **({"stream": True, "stream_options": {"include_usage": True}} if stream else {})}
        if leaves and stream:
            await ask("127.0.0.1", port, body, leave_after=chance.randrange(1, 12))
            seen.left += 1
            continue
        try:
            async with asyncio.timeout(chance.uniform(0.01, 2) if leaves else None):
                reply = await ask("127.0.0.1", port, body)
        except TimeoutError:
            seen.left += 1
        else:
            _compare(item, reply, known, seen)


def _compare(item: Item, reply: Reply, known: Sequence[Item], seen: Seen) -> None:
    if reply.status != 200:
        seen.refused[reply.status] += 1
        return
    seen.answered += 1
    if (reply.text, reply.finish_reason, reply.error) != (item.text, item.finish_reason, None):
        others = [other for other in known if other.text == reply.text]
        kind = "the answer to another request" if others else "wrong answer"
        seen.wrong.append(f"{kind}: {reply.text!r:.80} ({reply.error}), expected {item.text!r:.80}")


async def watch(port: int, process: psutil.Process, seen: Seen, began: float, end: float) -> None:
    """Request `/health` five times per second, and sample the memory every second."""
    while time.monotonic() < end:
        asked = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status = (await reader.read()).split(b" ", 2)[1]
        writer.close()
        seen.health.append(time.perf_counter() - asked)
        if status != b"200":
            seen.wrong.append(f"/health answered {status!r}")
        if len(seen.health) % 5 == 0:
            seen.memory.append((time.monotonic() - began, process.memory_info().rss))
        await asyncio.sleep(0.2)


async def load(port: int, process: psutil.Process, known: Sequence[Item], clients: int, seconds: float) -> Seen:
    """Run all clients for ``seconds``, then check that no work is left."""
    seen = Seen()
    began = time.monotonic()
    end = began + seconds
    asking = [client(port, known, seen, end, random.Random(i)) for i in range(clients)]
    await asyncio.gather(watch(port, process, seen, began, end), *asking)
    # Work of disconnected clients should be cancelled by now.
    await asyncio.sleep(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    counters = (await reader.read()).decode()
    writer.close()
    for name in ("running", "waiting"):
        if f"aria_requests_{name} 0.0" not in counters:
            seen.wrong.append(f"requests are still {name} after all clients disconnected")
    return seen


def summary(seen: Seen, warm: float) -> dict[str, Any]:
    """Summarise; memory growth compares the peak after the first ``warm`` seconds with the peak within them."""
    early = max((used for at, used in seen.memory if at <= warm), default=0)
    late = max((used for at, used in seen.memory if at > warm), default=early)
    health = statistics.quantiles(seen.health, n=100, method="inclusive")
    return {
        "answered": seen.answered,
        "left": seen.left,
        "refused": dict(seen.refused),
        "wrong": len(seen.wrong),
        "first_wrong": seen.wrong[:5],
        "health_seconds": {"p50": health[49], "p99": health[98], "max": max(seen.health)},
        "memory_bytes": {"warm": early, "after": late},
        "memory_growth": late / early - 1 if early else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the load test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    seconds = arguments.minutes * 60
    torch.set_num_threads(1)
    known = items()
    with served() as (port, pid):
        seen = asyncio.run(load(port, psutil.Process(pid), known, arguments.clients, seconds))
    found = summary(seen, warm=seconds / 5)
    rows = [(name, str(value)) for name, value in found.items()]
    print(measure.table(rows, ("", "")))
    measure.report({"clients": arguments.clients, "minutes": arguments.minutes, **found}, arguments.json)
    if seen.wrong or seen.refused or not seen.answered:
        sys.exit(1)


if __name__ == "__main__":
    main()
