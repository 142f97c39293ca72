"""Throughput and latency under load: ``python -m bench.engine.throughput --rates 2 8 32``.

Requests arrive as a Poisson process, with lognormal lengths of prompts and answers, and an image in every second
request of one mix. Reports for each rate: total tokens per second, time to first token, and time per token after it.
Prompts are prepared beforehand, so this measures the engine alone.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from aria import Engine, SamplingParams
from aria.engine.request import Request
from aria.engine.runner import GRAPH_TOKENS
from aria.processor.image_inputs import ImageSpan
from bench import measure, script
from bench.engine.prefill import image_message, random_image
from bench.measure import Ceilings


@dataclass(frozen=True)
class Mix:
    """A mix of requests."""

    name: str
    prompt: tuple[float, float]
    """Tokens of a prompt's text: median, and standard deviation of the logarithm."""
    answer: tuple[float, float]
    """The same for an answer."""
    images: float
    """Share of requests with an image."""


MIXES = (
    Mix("text", (256, 0.8), (128, 0.6), 0.0),
    Mix("images", (64, 0.8), (128, 0.6), 0.5),
)


@dataclass
class Arrival:
    """A request; times are in seconds since the start."""

    at: float
    prompt: Sequence[int]
    tokens: int
    images: Sequence[ImageSpan] = ()
    times: list[float] = field(default_factory=list)
    """Time of each token."""


def draw(engine: Engine, mix: Mix, rate: float, seconds: float, seed: int, longest: int) -> list[Arrival]:
    """Draw random requests, at least two.

    Args:
        engine: Engine that prepares the images.
        mix: Lengths and share of images.
        rate: Mean requests per second.
        seconds: Duration of arrivals.
        seed: Seed of all draws.
        longest: Maximum tokens of a prompt's text and of an answer.
    """
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    side = min(engine.config.image_sizes())
    arrivals: list[Arrival] = []
    at = 0.0
    while (at := at + random.exponential(1 / rate)) < seconds or len(arrivals) < 2:
        length, answer = (
            int(np.clip(random.lognormal(math.log(median), spread), 4, longest))
            for median, spread in (mix.prompt, mix.answer)
        )
        ids = measure.random_prompt(engine.config, length, generator)
        if random.random() >= mix.images:
            arrivals.append(Arrival(at, ids, answer))
            continue
        prepared = engine.prepare(image_message([random_image(side, side, random)], side))
        arrivals.append(Arrival(at, [*prepared.ids, *ids], answer, prepared.images))
    return arrivals


def serve(engine: Engine, arrivals: Sequence[Arrival]) -> float:
    """Add requests at their times and answer all; return the seconds that this takes."""
    core = engine.core
    running: dict[Request, Arrival] = {}
    waiting = sorted(arrivals, key=lambda arrival: arrival.at, reverse=True)
    began = time.perf_counter()
    while waiting or core.busy:
        now = time.perf_counter() - began
        while waiting and waiting[-1].at <= now:
            arrival = waiting.pop()
            params = SamplingParams(max_tokens=arrival.tokens, temperature=2.0, seed=len(waiting), ignore_eos=True)
            (request,) = core.add(arrival.prompt, params, images=arrival.images)
            running[request] = arrival
        if not core.busy:
            time.sleep(max(0.0, waiting[-1].at - now))
            continue
        tokens = core.step()
        now = time.perf_counter() - began
        for token in tokens:
            running[token.request].times.append(now)
    return time.perf_counter() - began


def warm_up(engine: Engine, longest: int) -> None:
    """Run every batch size and short prompts of every length twice, so that all CUDA graphs are captured."""
    core = engine.core
    generator = torch.Generator().manual_seed(0)

    def add(length: int, tokens: int) -> None:
        prompt = measure.random_prompt(engine.config, length, generator)
        core.add(prompt, SamplingParams(max_tokens=tokens, temperature=2.0, seed=0, ignore_eos=True))

    def finish() -> None:
        while core.busy:
            core.step()

    most = core.max_batch
    for length in (16, longest):
        # One answer ends in each step, and near the end in every second one, so that every batch size occurs twice.
        for rank in range(most, 0, -1):
            add(length if rank == most else 16, rank + min(rank, 8))
        finish()
    for length in (size for size in GRAPH_TOKENS if size <= longest):
        for _ in range(2):
            add(length, 1)
            finish()


def summarise(mix: Mix, rate: float, arrivals: Sequence[Arrival], seconds: float) -> dict[str, Any]:
    """Summarise the results at one rate."""
    firsts = np.array([arrival.times[0] - arrival.at for arrival in arrivals]) * 1000
    nexts = [(a.times[-1] - a.times[0]) / (len(a.times) - 1) * 1000 for a in arrivals if len(a.times) > 1]
    row: dict[str, Any] = {
        "mix": mix.name, "requests_per_s": rate, "requests": len(arrivals), "seconds": seconds,
        "prompt_tokens": sum(len(arrival.prompt) for arrival in arrivals),
        "answer_tokens": sum(arrival.tokens for arrival in arrivals),
    }  # fmt: skip
    row["answer_tokens_per_s"] = row["answer_tokens"] / seconds
    for name, values in (("first_token_ms", firsts), ("next_token_ms", np.array(nexts))):
        row[name] = {f"p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)}
    return row


def run(engine: Engine, limits: Ceilings, *, rates: Sequence[float], seconds: float, longest: int) -> dict[str, Any]:
    """Measure all mixes at all rates; ``limits`` is not used."""
    longest = min(longest, engine.max_model_len // 4)
    warm_up(engine, longest)
    rows = []
    for mix in MIXES:
        # Warm up: other numbers of images are other shapes.
        serve(engine, draw(engine, mix, rates[-1], seconds / 3, len(rates), longest))
        for number, rate in enumerate(rates):
            arrivals = draw(engine, mix, rate, seconds, number, longest)
            took = serve(engine, arrivals)
            rows.append(summarise(mix, rate, arrivals, took))
    print(show(rows))
    return {"throughput": rows}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a table."""
    cells = [
        (
            f"{row['mix']}, {row['requests_per_s']:g} requests/s",
            f"{row['answer_tokens_per_s']:.0f}",
            *(f"{row[name][share]:.1f}" for name in ("first_token_ms", "next_token_ms") for share in ("p50", "p99")),
        )
        for row in rows
    ]
    return measure.table(cells, ("requests", "tok/s", "TTFT ms p50", "p99", "ms/token p50", "p99"))


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2, 8, 16, 32, 64], metavar="R", help="requests per second"
    )
    parser.add_argument("--seconds", type=float, default=6, help="duration of arrivals at each rate")
    parser.add_argument("--longest", type=int, default=2048, help="maximum tokens of a prompt's text and of an answer")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    work = {"rates": arguments.rates, "seconds": arguments.seconds, "longest": arguments.longest}
    script.run_script(arguments, run, None, work)


if __name__ == "__main__":
    main()
