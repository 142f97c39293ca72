"""Many people at once: ``python -m bench.engine.throughput --rates 2 8 32``.

Requests arrive at random (Poisson), with prompts and answers of lognormal lengths and a picture in every second one of
the mix with pictures. For each rate: tokens a second of all together, and what one of them waits, for the first token
and for each one after. Prompts are prepared beforehand: what is measured is the engine.
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
from bench.engine.prefill import picture_message, random_picture
from bench.measure import Ceilings


@dataclass(frozen=True)
class Mix:
    """What people ask."""

    name: str
    prompt: tuple[float, float]
    """Median of the tokens of a prompt's text, and standard deviation of their logarithm."""
    answer: tuple[float, float]
    """The same of an answer."""
    pictures: float
    """Share of requests with a picture."""


MIXES = (
    Mix("text", (256, 0.8), (128, 0.6), 0.0),
    Mix("pictures", (64, 0.8), (128, 0.6), 0.5),
)


@dataclass
class Arrival:
    """A request before and while it runs; times in seconds since the start."""

    at: float
    prompt: Sequence[int]
    tokens: int
    images: Sequence[ImageSpan] = ()
    times: list[float] = field(default_factory=list)
    """When each token was there."""


def draw(engine: Engine, mix: Mix, rate: float, seconds: float, seed: int, longest: int) -> list[Arrival]:
    """Random requests of some seconds, at least two.

    Args:
        engine: prepares the pictures.
        mix: lengths and pictures.
        rate: requests a second, the mean.
        seconds: how long they go on arriving.
        seed: equal ones draw equal requests.
        longest: tokens that a prompt's text or an answer has at most.
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
        if random.random() >= mix.pictures:
            arrivals.append(Arrival(at, ids, answer))
            continue
        prepared = engine.prepare(picture_message([random_picture(side, side, random)], side))
        arrivals.append(Arrival(at, [*prepared.ids, *ids], answer, prepared.images))
    return arrivals


def serve(engine: Engine, arrivals: Sequence[Arrival]) -> float:
    """Let requests arrive at their times and answer them all. Returns the seconds that this takes."""
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
    """Run every batch size and short prompts of every length twice: the engine makes a graph of what comes again."""
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
        # An answer ends in each step, and near the end in every second one, so that every size comes twice.
        for rank in range(most, 0, -1):
            add(length if rank == most else 16, rank + min(rank, 8))
        finish()
    for length in (size for size in GRAPH_TOKENS if size <= longest):
        for _ in range(2):
            add(length, 1)
            finish()


def summarise(mix: Mix, rate: float, arrivals: Sequence[Arrival], seconds: float) -> dict[str, Any]:
    """What happened at one rate."""
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
    """All mixes at all rates. The ceilings have no part in it; they stand beside the results."""
    longest = min(longest, engine.max_model_len // 4)
    warm_up(engine, longest)
    rows = []
    for mix in MIXES:
        # A rehearsal: other numbers of pictures together are other shapes.
        serve(engine, draw(engine, mix, rates[-1], seconds / 3, len(rates), longest))
        for number, rate in enumerate(rates):
            arrivals = draw(engine, mix, rate, seconds, number, longest)
            took = serve(engine, arrivals)
            rows.append(summarise(mix, rate, arrivals, took))
    print(show(rows))
    return {"throughput": rows}


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people."""
    cells = [
        (
            f"{row['mix']}, {row['requests_per_s']:g} requests/s",
            f"{row['answer_tokens_per_s']:.0f}",
            *(f"{row[name][share]:.1f}" for name in ("first_token_ms", "next_token_ms") for share in ("p50", "p99")),
        )
        for row in rows
    ]
    return measure.table(cells, ("requests", "tok/s", "first ms p50", "p99", "next ms p50", "p99"))


def add_work(parser: argparse.ArgumentParser) -> None:
    """The options that say how much to do."""
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2, 8, 16, 32, 64], metavar="R", help="requests a second"
    )
    parser.add_argument("--seconds", type=float, default=6, help="how long requests arrive at each rate")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a prompt's text or of an answer at most")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    work = {"rates": arguments.rates, "seconds": arguments.seconds, "longest": arguments.longest}
    script.run_script(arguments, run, None, work)


if __name__ == "__main__":
    main()
