"""Benchmarks of the server: overhead on a small model end to end, and a short load test on nano."""

from __future__ import annotations

import asyncio
import json

import psutil
import pytest

from bench.server import serve
from bench.server.serve_load import Item, Seen, load, summary
from tests.helpers.serving import running, straight


def item(text: str) -> Item:
    messages = [{"role": "user", "content": text}]
    result = straight(messages, max_tokens=12)
    return Item({"messages": messages, "max_tokens": 12, "temperature": 0.0}, result.text, result.finish_reason)


def test_overhead(capsys):
    serve.main(["--model", "small", "--device", "cpu", "--streams", "2", "--tokens", "4", "--prompt", "28",
                "--rounds", "1", "--ones", "1"])  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens_per_second"]["bare"] > 0 < found["tokens_per_second"]["served"]
    assert found["first_token_seconds"]["bare"] > 0 < found["first_token_seconds"]["served"]
    assert found["throughput_lost"] < 1


@pytest.fixture(scope="module")
def live():
    with running() as live:
        yield live


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_load_detects_wrong_answers(live, right):
    one, other = item("hello"), item("thank you")
    known = [one, other] if right else [one, Item(other.body, one.text, one.finish_reason)]
    port = int(live.address.rsplit(":", 1)[1])
    seen = asyncio.run(load(port, psutil.Process(), known, clients=4, seconds=1.5))
    found = summary(seen, warm=0.5)
    assert found["answered"] > 0
    assert found["left"] > 0
    assert found["refused"] == {}
    assert (found["wrong"] == 0) is right
    assert 0 < found["health_seconds"]["p50"] <= found["health_seconds"]["max"]
    assert found["memory_bytes"]["after"] > 0


def test_memory_growth_is_relative_to_the_warm_peak():
    memory = [(1.0, 100), (2.0, 120), (11.0, 126), (20.0, 110)]
    found = summary(Seen(health=[0.1, 0.2, 0.3], memory=memory), warm=10)
    assert found["memory_growth"] == pytest.approx(0.05)
