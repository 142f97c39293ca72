"""`AsyncEngine`: many callers share one model; leaving cancels, and errors reach the caller that caused them."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from aria import AriaForConditionalGeneration, Engine, SamplingParams
from aria.engine import AsyncEngine, grammar, request
from aria.engine.request import Status
from aria.processor import Prompt
from tests.helpers.conversations import CONVERSATIONS, asked

PARAMS = SamplingParams(max_tokens=12)
PATIENCE = 120
"""Seconds after which a test counts as hung."""


@pytest.fixture(scope="module")
def engine(model_folder):
    with AsyncEngine(model_folder, device="cpu", max_batch=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(model_folder):
    return [result.text for result in Engine(model_folder, device="cpu").chat(CONVERSATIONS, PARAMS)]


async def collect(engine: AsyncEngine, messages, params=PARAMS) -> str:
    return "".join([piece async for piece in engine.stream(messages, params)])


def test_concurrent_streams_give_the_answers_of_chat(engine, expected):
    async def run():
        return await asyncio.gather(*(collect(engine, CONVERSATIONS[i % 3]) for i in range(12)))

    assert asyncio.run(run()) == expected * 4


def test_chat_returns_all_choices(engine):
    params = SamplingParams(max_tokens=6, n=3, temperature=1.5, seed=4)
    result = asyncio.run(engine.chat(CONVERSATIONS[1], params))
    assert len(result.choices) == 3
    assert result.usage.completion_tokens == sum(len(choice.token_ids) for choice in result.choices)


def test_leaving_a_stream_cancels_its_request(engine):
    async def run():
        stream = engine.stream(asked("hello"), SamplingParams(max_tokens=3000, ignore_eos=True, temperature=1.0))
        await anext(stream)
        assert engine.engine.core.unfinished
        await stream.aclose()
        while engine.engine.core.busy:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
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


def test_a_malformed_message_fails_only_its_caller(engine, expected):
    async def run():
        wrong = collect(engine, [{"role": "nobody", "content": "x"}])
        return await asyncio.gather(collect(engine, CONVERSATIONS[2]), wrong, return_exceptions=True)

    good, bad = asyncio.run(run())
    assert good == expected[2]
    assert isinstance(bad, ValueError)


def test_a_failing_step_fails_its_requests_and_the_queue_continues(engine, expected, monkeypatch):
    launch = engine.engine.core.runner.launch
    computed: list[int] = []

    def failing(plan):
        if not computed and len(plan.decodes) == 4:
            computed.extend(request.id for request in plan.requests)
            raise RuntimeError("a fault")
        return launch(plan)

    monkeypatch.setattr(engine.engine.core.runner, "launch", failing)

    async def run():
        return await asyncio.gather(*(collect(engine, CONVERSATIONS[i % 3]) for i in range(9)), return_exceptions=True)

    answers = asyncio.run(run())
    failed = [answer for answer in answers if isinstance(answer, RuntimeError)]
    assert len(failed) == len(computed) == 4 and len(set(map(id, failed))) == 4
    assert all(str(error) == "a step of the model failed: a fault" for error in failed)
    good = [i for i, answer in enumerate(answers) if isinstance(answer, str)]
    assert len(good) == 5 and all(answers[i] == expected[i % 3] for i in good)
    assert not engine.failing, "the answers after it came"
    engine.engine.core.scheduler.check()


def test_a_failure_outside_the_model_ends_all_answers_but_not_the_thread(engine, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "step", lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="the engine failed: division by zero"):
            asyncio.run(collect(engine, CONVERSATIONS[0]))
    assert asyncio.run(collect(engine, CONVERSATIONS[0])) == expected[0]


def test_step_seconds_of_a_running_step(engine, monkeypatch):
    step, entered, released = engine.engine.step, threading.Event(), threading.Event()

    def slow():
        entered.set()
        assert released.wait(60)
        return step()

    async def run():
        answer = asyncio.create_task(engine.chat(CONVERSATIONS[0], PARAMS))
        await asyncio.to_thread(entered.wait, 60)
        first = engine.step_seconds
        while engine.step_seconds <= first:
            await asyncio.sleep(0)
        released.set()
        await answer
        while engine.step_seconds:
            await asyncio.sleep(0)

    monkeypatch.setattr(engine.engine, "step", slow)
    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_closed_event_loop_affects_no_other_caller(engine, expected, monkeypatch):
    step, released, reading = engine.engine.step, threading.Event(), threading.Event()

    def slow():
        pieces = step()
        reading.set()
        released.wait(PATIENCE)
        return pieces

    async def leave():
        stream = engine.stream(asked("hello"), SamplingParams(max_tokens=3000, ignore_eos=True))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(reading.wait, PATIENCE)
        waiting.cancel()

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "step", slow)
        asyncio.run(leave())
        released.set()
    assert asyncio.run(asyncio.wait_for(collect(engine, CONVERSATIONS[1]), PATIENCE)) == expected[1]


def test_closing_while_messages_are_prepared_raises(model_folder, monkeypatch):
    engine = AsyncEngine(model_folder, device="cpu")
    prepare = engine.engine.prepare

    def closing(messages):
        prepared = prepare(messages)
        engine.close()
        return prepared

    monkeypatch.setattr(engine.engine, "prepare", closing)
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(asyncio.wait_for(collect(engine, asked("hello")), 30))


def test_a_closed_engine_raises(model_folder):
    engine = AsyncEngine(model_folder, device="cpu")
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(collect(engine, asked("hello")))


def test_prepared_prompts_can_be_answered_repeatedly(engine, expected):
    async def run():
        prepared = await engine.prepare(CONVERSATIONS[0])
        assert prepared.stop == ("<|im_end|>",)
        return [await collect(engine, prepared) for _ in range(2)]

    assert asyncio.run(run()) == [expected[0]] * 2


def test_plain_text_is_completed_without_template(engine, model_folder):
    text = "the quick <|img|> fox<|im_end|>"
    ids = engine.engine.processor.tokenizer.encode(Prompt.raw(text))

    async def run():
        by_text, by_ids = await engine.prepare_text(text), await engine.prepare_text(ids)
        assert by_text.ids == by_ids.ids == ids and by_text.stop == () and not by_text.images
        return [await engine.chat(one, PARAMS) for one in (by_text, by_ids)]

    first, second = asyncio.run(run())
    assert first == second
    inputs = torch.tensor([ids])
    model = AriaForConditionalGeneration.from_pretrained(model_folder, device="cpu")
    expected = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12)
    assert list(first.token_ids) == expected[0, len(ids) :].tolist()[: len(first.token_ids)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no tokens"),
        ([], "no tokens"),
        ([1, 10**9], "1000000000 for a token id; expected 0 to"),
        ([True], "True for a token id"),
        (["a"], "'a' for a token id"),
        ([9], "stands for an image"),
        ("hello " * 5000, "leaves no room"),
    ],
)
def test_invalid_plain_prompts_are_rejected(engine, text, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(engine.prepare_text(text))


def test_pieces_report_cached_tokens(engine):
    async def cached(prepared):
        return [piece.answer.cached_tokens async for piece in engine.pieces(prepared, PARAMS)]

    async def run():
        prepared = await engine.prepare_text("a prompt that no other test sends " * 4)
        return len(prepared.ids), await cached(prepared), await cached(prepared)

    length, first, again = asyncio.run(run())
    assert set(first) == {0} and set(again) == {(length - 1) // 16 * 16}


def test_schemas_are_followed_or_rejected(engine):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}

    async def run():
        good = SamplingParams(json_schema=schema, n=2, temperature=1.0)
        bad = SamplingParams(json_schema={"type": "float"})
        answers = [engine.chat(CONVERSATIONS[i % 3], bad if i == 4 else good) for i in range(9)]
        return await asyncio.gather(*answers, return_exceptions=True)

    results = asyncio.run(run())
    assert isinstance(results.pop(4), ValueError)
    texts = [choice.text for result in results for choice in result.choices]
    assert len(texts) == 16 and set(texts) <= {"[1,1]", "[1,2]", "[2,1]", "[2,2]"}


def test_schemas_are_never_compiled_in_the_engine_thread(engine, monkeypatch):
    compiled_by = []
    build = grammar.Grammars._build

    def noted(*args):
        compiled_by.append(threading.current_thread().name)
        return build(*args)

    monkeypatch.setattr(grammar.Grammars, "_build", noted)
    monkeypatch.setattr(grammar, "KEPT_GRAMMARS", 0)  # others have pushed it out at once
    params = SamplingParams(json_schema={"enum": ["pushed out"]})
    assert asyncio.run(engine.chat(CONVERSATIONS[0], params)).text == '"pushed out"'
    assert compiled_by and "aria-engine" not in compiled_by


@pytest.mark.parametrize("by", ["messages", "engine", "processor"])
def test_prompts_are_never_hashed_in_the_engine_thread(by, engine, monkeypatch):
    messages = asked(f"by {by} " + "a long prompt " * 60)
    hashed_by = []
    hash_block = request.block_hash

    def noted(*args):
        hashed_by.append(threading.current_thread().name)
        return hash_block(*args)

    monkeypatch.setattr(request, "block_hash", noted)

    async def run():
        given = messages
        if by == "engine":
            given = await engine.prepare(messages)
        elif by == "processor":
            given = engine.engine.processor.prepare(messages)
        return await engine.chat(given, SamplingParams(max_tokens=1, n=2))

    asyncio.run(run())
    assert len(hashed_by) == len(engine.engine.prepare(messages).ids) // 16 > 20 and "aria-engine" not in hashed_by


def test_a_step_wakes_an_event_loop_once_for_all_its_callers(engine):
    async def run():
        loop, calls = asyncio.get_running_loop(), 0
        ordinary = loop.call_soon_threadsafe

        def counted(callback, *args, **kwargs):
            nonlocal calls
            calls += getattr(callback, "__name__", "") == "_hand_out"
            return ordinary(callback, *args, **kwargs)

        loop.call_soon_threadsafe = counted
        prepared = await engine.prepare(asked("hello"))
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        results = await asyncio.gather(*(engine.chat(prepared, params) for _ in range(4)))
        return calls, sum(result.usage.completion_tokens for result in results)

    calls, tokens = asyncio.run(run())
    assert tokens == 160 and calls <= 80, "four answers that grow together take little more than forty steps"


def test_closing_cancels_before_the_next_step(engine, monkeypatch):
    step, entered, released = engine.engine.step, threading.Event(), threading.Event()

    def slow():
        entered.set()
        assert released.wait(PATIENCE)
        return step()

    async def run():
        pieces = engine.pieces(asked("hello"), SamplingParams(max_tokens=3000, ignore_eos=True))
        request = (await anext(pieces)).answer.requests[0]
        with monkeypatch.context() as patch:
            patch.setattr(engine.engine, "step", slow)
            entered.clear()
            await asyncio.to_thread(entered.wait, PATIENCE)
            outputs = len(request.outputs)
            await pieces.aclose()
            released.set()
        while request.status is Status.RUNNING:
            await asyncio.sleep(0.01)
        return request, len(request.outputs) - outputs

    request, more = asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert request.status is Status.CANCELLED
    assert more <= 1, "the step that was under way is the last"


def test_stats_from_another_thread(engine):
    before = engine.stats()

    async def run():
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        work = asyncio.gather(*(engine.chat(asked("hello"), params) for _ in range(6)))
        while (now := engine.stats()).running < 4:
            await asyncio.sleep(0)
        assert now.waiting <= 2 and 0 < now.cache_usage <= 1
        await work

    asyncio.run(run())
    after = engine.stats()
    assert after.completion_tokens - before.completion_tokens == 360
    assert (after.running, after.waiting, after.cache_usage) == (0, 0, 0.0)
