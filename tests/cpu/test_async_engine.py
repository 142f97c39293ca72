"""`AsyncEngine`: many callers, one model; leaving early cancels, errors reach who caused them."""

from __future__ import annotations

import asyncio
import threading

import pytest
from test_engine import CONVERSATIONS, asked

from aria import Engine, SamplingParams
from aria.engine import AsyncEngine

PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def engine(model_folder):
    with AsyncEngine(model_folder, device="cpu", max_batch=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(model_folder):
    return [result.text for result in Engine(model_folder, device="cpu").chat(CONVERSATIONS, PARAMS)]


async def collect(engine: AsyncEngine, messages, params=PARAMS) -> str:
    return "".join([piece async for piece in engine.stream(messages, params)])


def test_streams_together_give_what_chat_gives(engine, expected):
    async def run():
        return await asyncio.gather(*(collect(engine, CONVERSATIONS[i % 3]) for i in range(12)))

    assert asyncio.run(run()) == expected * 4


def test_chat_gives_all_choices(engine):
    params = SamplingParams(max_tokens=6, n=3, temperature=1.5, seed=4)
    result = asyncio.run(engine.chat(CONVERSATIONS[1], params))
    assert len(result.choices) == 3
    assert result.usage.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)


def test_leaving_early_cancels(engine):
    async def run():
        stream = engine.stream(asked("hello"), SamplingParams(max_tokens=3000, ignore_eos=True, temperature=1.0))
        await anext(stream)
        assert engine.engine.core.unfinished
        await stream.aclose()
        for _ in range(500):
            if not engine.engine.core.busy:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the request went on without a listener")

    asyncio.run(run())
    pool = engine.engine.core.pool
    assert pool.used == 0


def test_cancelling_the_task_cancels_the_request(engine, expected):
    async def run():
        long = SamplingParams(max_tokens=3000, ignore_eos=True, temperature=1.0)
        task = asyncio.create_task(collect(engine, asked("hello"), long))
        while not engine.engine.core.unfinished:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await collect(engine, CONVERSATIONS[0])

    assert asyncio.run(run()) == expected[0]


def test_a_wrong_message_is_an_error_of_its_caller_alone(engine, expected):
    async def run():
        wrong = collect(engine, [{"role": "nobody", "content": "x"}])
        return await asyncio.gather(collect(engine, CONVERSATIONS[2]), wrong, return_exceptions=True)

    good, bad = asyncio.run(run())
    assert good == expected[2]
    assert isinstance(bad, ValueError)


def test_a_failing_step_is_told_to_all_who_wait_and_the_next_request_runs(engine, expected, monkeypatch):
    launch = engine.engine.core.runner.launch
    calls = iter(range(1000))

    def failing(plan):
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return launch(plan)

    monkeypatch.setattr(engine.engine.core.runner, "launch", failing)

    async def run():
        both = await asyncio.gather(*(collect(engine, CONVERSATIONS[i]) for i in range(2)), return_exceptions=True)
        return both, await collect(engine, CONVERSATIONS[1])

    both, after = asyncio.run(run())
    assert all(isinstance(error, RuntimeError) for error in both)
    assert after == expected[1]
    engine.engine.core.scheduler.check()


def test_a_caller_whose_loop_has_closed_harms_nobody(engine, expected, monkeypatch):
    step, released, reading = engine.engine.step, threading.Event(), threading.Event()

    def slow():
        pieces = step()
        reading.set()
        released.wait(10)
        return pieces

    async def leave():
        stream = engine.stream(asked("hello"), SamplingParams(max_tokens=3000, ignore_eos=True))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(reading.wait, 10)
        waiting.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "step", slow)
        asyncio.run(leave())
        released.set()
    assert asyncio.run(asyncio.wait_for(collect(engine, CONVERSATIONS[1]), 30)) == expected[1]


def test_an_engine_that_closes_while_messages_are_prepared_says_so(model_folder, monkeypatch):
    engine = AsyncEngine(model_folder, device="cpu")
    prepare = engine.engine.prepare

    def closing(messages):
        prepared = prepare(messages)
        engine.close()
        return prepared

    monkeypatch.setattr(engine.engine, "prepare", closing)
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(asyncio.wait_for(collect(engine, asked("hello")), 30))


def test_a_closed_engine_says_so(model_folder):
    engine = AsyncEngine(model_folder, device="cpu")
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(collect(engine, asked("hello")))
