"""Overhead of the server over the bare engine: throughput of many streams, and time to first token of one.

    python -m bench.server.serve --model nano --streams 16
    python -m bench.server.serve --model aria --streams 64 --tokens 256

The same engine does the same work in turn: streamed within its process, and as server-sent events to clients in another
process. On a busy machine the CPU time of the server's process is more reliable than the clock. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aria.engine import AsyncEngine, SamplingParams
from aria.serve.app import create_app
from aria.serve.run import Server, configure
from aria.serve.settings import ServerSettings
from bench import measure
from bench.shapes import SHAPES

Work = list[dict[str, Any]]


def work(streams: int, tokens: int, prompt: int, number: object) -> Work:
    """Make request bodies of streams with new prompts."""
    return [
        {
            "messages": [{"role": "user", "content": f"{number} {i} {'what is this? ' * (prompt // 14)}"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 1.0,
            "seed": i,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(streams)
    ]


@contextmanager
def serving(engine: AsyncEngine) -> Iterator[int]:
    """Run a server on a free local port."""
    app = create_app(engine, ServerSettings(max_queue=4096))
    server = Server(configure(app, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def served(port: int, bodies: Work) -> tuple[float, list[float], int]:
    """Return total seconds, seconds to each first token, and tokens, as clients see them."""
    lines = "".join(json.dumps(body) + "\n" for body in bodies)
    command = [sys.executable, "-m", "bench.server.client", "127.0.0.1", str(port)]
    # The client imports only itself from this repository.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    if errors := [reply for reply in found["replies"] if reply["status"] != 200 or reply["error"]]:
        raise RuntimeError(f"a request failed: {errors[0]}")
    replies = found["replies"]
    return found["seconds"], [one["first"] for one in replies], sum(one["tokens"] for one in replies)


def bare(engine: AsyncEngine, runner: asyncio.Runner, bodies: Work) -> tuple[float, list[float], int]:
    """Return the same for the engine alone."""

    async def read(body: dict[str, Any]) -> tuple[float, int]:
        began = time.perf_counter()
        names = ("max_tokens", "ignore_eos", "temperature", "seed")
        first, tokens = 0.0, 0
        async for piece in engine.pieces(body["messages"], SamplingParams(**{name: body[name] for name in names})):
            if piece.text and not first:
                first = time.perf_counter() - began
            tokens += 1
        return first, tokens

    async def all_of_them() -> tuple[float, list[tuple[float, int]]]:
        began = time.perf_counter()
        got = await asyncio.gather(*(read(body) for body in bodies))
        return time.perf_counter() - began, got

    seconds, read_all = runner.run(all_of_them())
    return seconds, [first for first, _ in read_all], sum(tokens for _, tokens in read_all)


def compare(engine: AsyncEngine, *, streams: int, tokens: int, prompt: int, rounds: int, ones: int) -> dict[str, Any]:
    """Measure both in turn; return medians of the rounds."""
    rates: dict[str, list[float]] = {"bare": [], "served": []}
    firsts: dict[str, list[float]] = {"bare": [], "served": []}
    work_done: dict[str, list[float]] = {"bare": [], "served": []}
    with serving(engine) as port, asyncio.Runner() as runner:
        ways = {"bare": lambda bodies: bare(engine, runner, bodies), "served": lambda bodies: served(port, bodies)}
        for name, way in ways.items():
            way(work(streams, 8, prompt, f"warm {name}"))
        # Every prompt is new; otherwise the second way would hit the prefix cache.
        for number in range(rounds):
            for name, way in ways.items():
                before = time.process_time()
                seconds, _, count = way(work(streams, tokens, prompt, f"{name} {number}"))
                rates[name].append(count / seconds)
                work_done[name].append((time.process_time() - before) / count)
        for number in range(ones):
            for name, way in ways.items():
                firsts[name] += way(work(1, 4, prompt, f"{name} one {number}"))[1]
    rate, first, cpu = (
        {name: statistics.median(values) for name, values in found.items()} for found in (rates, firsts, work_done)
    )
    return {
        "streams": streams,
        "tokens": tokens,
        "tokens_per_second": rate,
        "throughput_lost": 1 - rate["served"] / rate["bare"],
        "first_token_seconds": first,
        "first_token_added": first["served"] - first["bare"],
        "cpu_seconds_per_token": cpu,
        "rounds": rates,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("nano", *SHAPES), default="nano")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--prompt", type=int, default=128, help="approximate tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ones", type=int, default=15, help="single requests for the time to first token")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    if arguments.device.type == "cpu":
        torch.set_num_threads(1)
    model = None if arguments.model == "nano" else SHAPES[arguments.model]()
    cache = None if arguments.device.type == "cuda" else max(8192, arguments.streams * 512)
    dtype = measure.dtype_of(arguments.device)
    with AsyncEngine(model, device=arguments.device, dtype=dtype, cache_tokens=cache) as engine:
        chosen = ("streams", "tokens", "prompt", "rounds", "ones")
        found = compare(engine, **{name: getattr(arguments, name) for name in chosen})
    rate, first = found["tokens_per_second"], found["first_token_seconds"]
    cpu = found["cpu_seconds_per_token"]
    rows = [
        (name, f"{rate[name]:.0f}", f"{first[name] * 1000:.1f}", f"{cpu[name] * 1e6:.0f}")
        for name in ("bare", "served")
    ]
    print(measure.table(rows, ("", "tokens/s", "TTFT, ms", "CPU us/token")))
    print(f"overhead: {found['throughput_lost']:.1%} of throughput, {found['first_token_added'] * 1000:.1f} ms of TTFT")
    measure.report({"machine": measure.machine(arguments.device), "model": arguments.model, **found}, arguments.json)


if __name__ == "__main__":
    main()
