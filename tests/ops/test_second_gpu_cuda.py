"""Models on a GPU other than the current one."""

from __future__ import annotations

import asyncio

import pytest
import torch

from aria import AriaForConditionalGeneration, AsyncEngine, Engine, SamplingParams

pytestmark = pytest.mark.multi_gpu

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(autouse=True)
def _first_gpu_stays_current():
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def test_generation_equals_that_of_the_first_gpu():
    found = []
    for device in ("cuda:0", "cuda:1"):
        model = AriaForConditionalGeneration.from_pretrained(device=device, dtype="float32")
        assert model.device == torch.device(device)
        ids = torch.tensor([[20, 40, 60, 80, 100]], device=device)
        with torch.no_grad():
            logits = model(ids).logits
        sampled = model.generate(ids, max_new_tokens=24, do_sample=True, seed=1)
        found.append((logits.cpu(), sampled.cpu()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert torch.equal(found[0][1], found[1][1])


def test_gradients_equal_those_of_the_first_gpu():
    found = []
    for device in ("cuda:0", "cuda:1"):
        model = AriaForConditionalGeneration.from_pretrained(device=device, dtype="float32").train()
        ids = torch.tensor([[20, 40, 60, 80, 100]], device=device)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach().cpu(), model.model.language_model.lm_head.weight.grad.cpu()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_engines_on_both_gpus_give_equal_answers_at_the_same_time():
    engines = [Engine(device=device, dtype="float32", max_batch=8) for device in ("cuda:0", "cuda:1")]
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3, ignore_eos=True)
    answers = [[engine.queue(engine.prepare(QUESTION), params) for _ in range(6)] for engine in engines]
    while any(engine.core.busy for engine in engines):
        for engine in engines:
            if engine.core.busy:
                engine.step()
    texts = [[answer.result().text for answer in some] for some in answers]
    assert texts[0] == texts[1] and len(set(texts[0])) == 1


def test_an_engine_in_a_thread_runs_on_the_second_gpu():
    """A new thread starts with the first GPU as its current one."""
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    expected = Engine(device="cuda:0", dtype="float32", max_batch=4).chat([QUESTION], params)[0].text
    engine = Engine(device="cuda:1", dtype="float32", max_batch=4)
    engine.warm_up()
    with AsyncEngine(engine=engine) as answering:
        assert asyncio.run(answering.chat(QUESTION, params)).text == expected
