"""A long run of mixed requests on nano with a cache that is always too small.

``ARIA_SOAK=2000 pytest tests/engine/test_soak.py`` is the whole; by default it is a part of that.
"""

from __future__ import annotations

import os
import random

import pytest
from PIL import Image, ImageDraw

from aria import Engine, SamplingParams
from tests.helpers.random_schemas import is_valid, random_schema

REQUESTS = int(os.environ.get("ARIA_SOAK", "220"))
QUESTIONS = ("What does it say?", "What is in this picture?", "Which colour is it?", "How many shapes are there?")


def image(seed: int) -> Image.Image:
    choice = random.Random(seed)
    image = Image.new("RGB", (choice.randrange(60, 230), choice.randrange(60, 230)), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(choice.randrange(1, 4)):
        x, y = choice.randrange(image.width - 30), choice.randrange(image.height - 30)
        draw.ellipse((x, y, x + 30, y + 30), fill=choice.choice(["red", "green", "blue", "orange"]))
    draw.text((5, 5), choice.choice(["HELLO", "STOP", "CAFE 42"]), fill="black")
    return image


IMAGES = [image(seed) for seed in range(6)]


def conversation(kind: int) -> tuple[list[dict], SamplingParams]:
    """One of some dozens of requests: with images or none, greedy or drawn, short or long, free or by a schema."""
    choice = random.Random(kind)
    images = choice.sample(IMAGES, choice.choice([0, 1, 1, 2]))
    parts: list[dict] = [{"type": "image", "image": image, "max_image_size": 224} for image in images]
    text = choice.choice(QUESTIONS) if images else "Hello! " * choice.randrange(1, 30)
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    temperature = choice.choice([0.0, 0.0, 0.9])
    schema = random_schema(choice) if choice.random() < 0.3 else None
    params = SamplingParams(
        max_tokens=choice.randrange(1, 40), temperature=temperature, top_p=choice.choice([1.0, 0.9]), seed=kind,
        ignore_eos=schema is None and choice.random() < 0.3, frequency_penalty=choice.choice([0.0, 0.0, 0.5]),
        n=choice.choice([1, 1, 1, 1, 3]), json_schema=schema,
    )  # fmt: skip
    return messages, params


@pytest.fixture(scope="module")
def engine():
    alone = Engine(device="cpu")
    expected = {}
    for kind in range(48):
        messages, params = conversation(kind)
        expected[kind] = alone.chat([messages], params)[0]
        for answer in expected[kind].choices:
            assert len(answer.token_ids) >= 1
            if params.json_schema is not None and answer.finish_reason == "stop":
                assert is_valid(answer.text, params.json_schema)
    return alone, expected


@pytest.mark.slow
def test_every_request_ends_with_its_text_or_is_cancelled(engine):
    alone, expected = engine
    longest = max(len(alone.prepare(conversation(kind)[0]).ids) + conversation(kind)[1].max_tokens for kind in expected)
    tight = Engine(device="cpu", max_model_len=longest, cache_tokens=longest + 200, max_batch=24)
    # Without the reserve that admission keeps, answers are preempted as often as they can be.
    tight.core.scheduler._watermark = 0
    prepared = {kind: tight.prepare(conversation(kind)[0]) for kind in expected}
    choice = random.Random(1)
    growing: dict = {}
    cancelled = ended = 0
    for number in range(REQUESTS):
        kind = choice.randrange(len(expected))
        answer = tight.queue(prepared[kind], conversation(kind)[1], priority=choice.randrange(3))
        growing[answer] = kind
        while len(growing) > 60 or (growing and number == REQUESTS - 1):
            tight.step()
            tight.core.scheduler.check()
            for answer, kind in list(growing.items()):
                if answer.done:
                    assert answer.result() == expected[kind]
                    del growing[answer]
                    ended += 1
                elif choice.random() < 0.002:
                    tight.cancel(answer)
                    del growing[answer]
                    cancelled += 1
    assert ended + cancelled == REQUESTS and cancelled > 0
    assert tight.core.scheduler.preemptions > REQUESTS // 10
    assert not tight.core.unfinished
    pool = tight.core.pool
    assert pool.used == 0 and pool.free + pool.cached == pool.total
