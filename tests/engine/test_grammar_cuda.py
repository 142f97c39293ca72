"""Answers that follow a schema on a GPU, where a step starts before the tokens of the one before are known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from aria import Engine, SamplingParams
from aria.engine.sampler import mask_logits
from tests.helpers.gpu_models import CONFIG, WIDE

pytestmark = pytest.mark.gpu

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
    },
    "required": ["colour", "count", "words"],
    "additionalProperties": False,
}


def answers(engine: Engine, count: int) -> list[tuple[SamplingParams, object]]:
    """Every second with a schema, of all kinds of length, and more of them than run together."""
    made = []
    for seed in range(count):
        messages = [{"role": "user", "content": "hello " * (1 + seed % 7)}]
        params = SamplingParams(
            max_tokens=20 + seed % 60, temperature=1.0, seed=seed, json_schema=SCHEMA if seed % 2 else None,
            logprobs=2 if seed % 5 == 0 else None, presence_penalty=0.5 * (seed % 3 == 0),
        )  # fmt: skip
        made.append((params, engine.queue(engine.prepare(messages), params)))
    while engine.core.busy:
        engine.step()
    return [(params, answer.result()) for params, answer in made]


def check(params: SamplingParams, result) -> bool:
    """Whether it is a whole value; if it is, a right one."""
    if params.json_schema is None or result.finish_reason == "length":
        return False
    assert result.finish_reason == "stop"
    value = json.loads(result.text)
    assert list(value) == ["colour", "count", "words"] and value["colour"] in ("red", "green")
    assert 0 <= value["count"] <= 99 and 1 <= len(value["words"]) <= 2
    return all(len(word) <= 3 for word in value["words"])


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["small", "graphs"])
def test_every_finished_answer_is_valid(config):
    config = replace(config, text=replace(config.text, vocab_size=4096))
    engine = Engine(config, device="cuda", dtype=torch.bfloat16, max_batch=16, max_model_len=512, cache_tokens=1024)
    assert engine.core.ahead
    whole = [check(*one) for one in answers(engine, 80)]
    assert sum(whole) > 5
    assert engine.stats().preemptions > 0


def test_a_step_ahead_changes_no_token():
    config = replace(CONFIG, text=replace(CONFIG.text, vocab_size=512))
    results = []
    for ahead in (True, False):
        engine = Engine(config, device="cuda", dtype=torch.float32, max_batch=16, max_model_len=512, cache_tokens=1024)
        engine.core.ahead = ahead
        results.append([result.token_ids for _, result in answers(engine, 60)])
    assert results[0] == results[1]


def test_masked_logits_equal_those_of_the_cpu():
    logits = torch.randn(9, 100_352).bfloat16()
    masks = torch.randint(-(2**31), 2**31, (4, 3136), dtype=torch.int32)
    places = torch.tensor([8, 0, 3, 5])
    expected = mask_logits(logits, places, masks)
    assert mask_logits(logits.cuda(), places.cuda(), masks.cuda()).cpu().equal(expected)


def test_warming_up_captures_graphs():
    config = replace(WIDE, text=replace(WIDE.text, vocab_size=4096))
    engine = Engine(config, device="cuda", dtype=torch.bfloat16, max_batch=8, max_model_len=1024, cache_tokens=8192)
    engine.warm_up()
    assert not engine.core.busy and engine.core.pool.free == engine.core.pool.total
    assert engine.chat([[{"role": "user", "content": "hello"}]], SamplingParams(max_tokens=3))[0].token_ids
