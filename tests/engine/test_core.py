"""`EngineCore` computes what the model computes, however requests are cut up, mixed, stopped and restarted."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref

import pytest
import torch

from aria.engine import SamplingParams, Stats
from aria.engine.core import EngineCore
from aria.engine.request import Status
from aria.engine.runner import Launched, Runner
from aria.model.decoder import Decoder
from aria.processor.image_inputs import ImageSpan
from tests.helpers.tiny_core import core, model, plain_logits, prompt, run, with_image, work


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_tokens": 16, "mixed_step_tokens": 16},
        {"max_batch": 2},
        {"cache_blocks": 14, "max_model_len": 200},
    ],
    ids=["mixed", "small chunks", "few rows", "preempted"],
)
def test_logits_equal_a_plain_pass(settings, fused, monkeypatch):
    # As on CUDA in 16 bits: layers in fused operations, the last one only for what is sampled from.
    launch = Runner.launch
    fused_layers = []

    def launch_fused(self, plan):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "fused", staticmethod(lambda x_TD: fused_layers.append(fused) or fused))
            return launch(self, plan)

    monkeypatch.setattr(Runner, "launch", launch_fused)
    engine = core(**settings)
    expected_places, seen = {}, []

    def look(launched):
        for request, logits in zip(launched.requests, launched.logits, strict=True):
            # The logits that gave token number len(outputs) so far; its value comes after the step.
            seen.append((request, len(request.outputs), logits.clone()))

    requests = []
    for seed in range(16):
        ids, images = work(seed)
        params = SamplingParams(max_tokens=30, temperature=1.0 if seed % 2 else 0.0, seed=seed)
        requests += engine.add(ids, params, images=images)
    run(engine, requests, look=look)
    for request in requests:
        full = [*request.prompt, *request.outputs]
        expected_places[request] = plain_logits(full, request.images)
    assert len(seen) >= 16 * 30 and set(fused_layers) == {fused}
    for request, n, logits in seen:
        expected = expected_places[request][len(request.prompt) + n - 1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    if "cache_blocks" in settings:
        assert engine.scheduler.preemptions > 5


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_tokens_do_not_depend_on_the_batch_or_preemption(temperature):
    def params(seed):
        return SamplingParams(max_tokens=10 + seed % 20, temperature=temperature, top_p=0.95, seed=seed)

    alone = []
    for seed in range(40):
        engine = core()
        ids, images = work(seed)
        [request] = engine.add(ids, params(seed), images=images)
        run(engine, [request])
        alone.append(request.outputs)
    engine = core(cache_blocks=15, max_model_len=200, max_batch=16)
    requests = []
    for seed in range(40):
        ids, images = work(seed)
        requests += engine.add(ids, params(seed), images=images, priority=seed % 3)
    run(engine, requests)
    assert engine.scheduler.preemptions > 0
    assert [request.outputs for request in requests] == alone


def test_several_answers_share_their_prompt():
    engine = core()
    ids, images = with_image(10, 40, 60, 3)
    requests = engine.add(ids, SamplingParams(max_tokens=5, temperature=1.0, seed=1, n=4), images=images)
    assert all(request.block_hashes(16)[0] is requests[0].block_hashes(16)[0] for request in requests), "named once"
    run(engine, requests)
    assert len({tuple(request.outputs) for request in requests}) > 1
    assert engine.scheduler.prefix_tokens >= 3 * (110 // 16 - 1) * 16


def test_prefix_caching_depends_on_image_content():
    answers = []
    for seeds in ((0, 1), (1, 0)):
        engine = core()
        requests = []
        for seed in seeds:
            ids, images = with_image(0, 48, 8, 0)
            other = torch.randn(48, 64, generator=torch.Generator().manual_seed(100 + seed))
            images = [ImageSpan(0, 48, b"%d" % seed, other)]
            [request] = engine.add(ids, SamplingParams(max_tokens=8), images=images)
            run(engine, [request])
            requests.append(request)
        answers.append({seed: request.outputs for seed, request in zip(seeds, requests, strict=True)})
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_ended_and_cancelled_requests_release_everything():
    engine = core(cache_blocks=40)
    choice = random.Random(0)
    kept = []
    for seed in range(60):
        ids, images = work(seed)
        requests = engine.add(ids, SamplingParams(max_tokens=8, n=1 + seed % 2), images=images)
        if seed % 3:
            kept += requests
        for _ in range(choice.randrange(3)):
            engine.step()
        if not seed % 3:
            for request in requests:
                engine.cancel(request)
    run(engine, kept)


def test_final_status_of_requests():
    engine = core(max_batch=2)
    short, given_up = (engine.add(prompt(9, 0), SamplingParams(max_tokens=n))[0] for n in (3, 30))
    [waiting] = engine.add(prompt(9, 1), SamplingParams(max_tokens=3))
    for _ in range(2):
        engine.step()
    assert (short.status, given_up.status, waiting.status) == (Status.RUNNING, Status.RUNNING, Status.WAITING)
    assert (engine.stats().running, engine.stats().waiting) == (2, 1)
    for request in (given_up, waiting, given_up):
        engine.cancel(request)
    run(engine, [short])
    assert short.status is Status.FINISHED
    assert given_up.status is waiting.status is Status.CANCELLED and len(given_up.outputs) == 2


def test_stats_count_from_the_start():
    engine = core(cache_blocks=60)
    assert engine.stats() == Stats(0, 0, 0.0, 0, 0, 0, 0, 0)
    for _ in range(2):
        engine.add(prompt(40, 0), SamplingParams(max_tokens=4))
        engine.step()
        assert engine.stats().running == 1 and engine.stats().cache_usage == 3 / 60
        while engine.unfinished:
            engine.step()
    after = engine.stats()
    assert (after.running, after.waiting, after.cache_usage, after.preemptions) == (0, 0, 0.0, 0)
    assert (after.prompt_tokens, after.completion_tokens) == (80, 8)
    assert (after.prefix_queries, after.prefix_hits) == (80, 32)


def test_end_tokens_end_an_answer_and_are_kept():
    engine = core()
    [free] = engine.add(prompt(9, 0), SamplingParams(max_tokens=20))
    run(engine, [free])
    end = free.outputs[6]
    [request] = engine.add(prompt(9, 0), SamplingParams(max_tokens=20), end_token_ids=[end])
    while engine.unfinished:
        engine.step()
    assert request.outputs == free.outputs[: free.outputs.index(end) + 1]
    [request] = engine.add(prompt(9, 0), SamplingParams(max_tokens=20, ignore_eos=True), end_token_ids=[end])
    run(engine, [request])


def test_invalid_input_is_rejected_before_anything_is_queued():
    engine = core()
    ids, images = with_image(10, 395, 3, 0)
    for wrong, message in (
        (lambda: engine.add([]), "no tokens"),
        (lambda: engine.add(prompt(400, 0)), r"length is 400 tokens.*resulted in 400 tokens.*leaves no room.*shorten"),
        (
            lambda: engine.add(ids, images=images),
            r"408 tokens, 395 of them for images.*fewer or smaller images",
        ),
        (lambda: core(max_model_len=5000), r"max_model_len is 5000; expected 1 to 4096"),
        (lambda: core(cache_blocks=3), r"holds 48 tokens, but max_model_len is 400"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert not engine.unfinished and not engine.busy


def test_max_model_len_is_reduced_to_what_fits_with_a_warning(caplog):
    engine = EngineCore(model(), max_batch=2, cache_blocks=20)
    assert engine.max_model_len == 320
    assert "max_model_len is 320" in caplog.text
    [request] = engine.add(prompt(310, 0), SamplingParams(max_tokens=50))
    run(engine, [request])
    assert len(request.outputs) == 10


@pytest.mark.slow
def test_the_engine_runs_without_triton():
    program = """
import sys
sys.modules["triton"] = None
from aria import Engine, SamplingParams
result = Engine(device="cpu").chat([[{"role": "user", "content": "Hello"}]], SamplingParams(max_tokens=4))[0]
assert len(result.token_ids) > 0
assert not [name for name in sys.modules if name.startswith("aria.ops.kernels")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_row_does_not_keep_an_ended_request_alive():
    engine = core()
    requests = engine.add(prompt(20, 0), SamplingParams(max_tokens=3, n=4))
    run(engine, requests)
    gone = [weakref.ref(request) for request in requests]
    del requests
    gc.collect()
    assert not any(request() for request in gone)


@pytest.mark.parametrize("part", ["plan", "launch", "wait"])
def test_an_interrupt_ends_all_requests_and_later_ones_run(part, monkeypatch):
    engine = core()
    [expected] = engine.add(prompt(30, 0), SamplingParams(max_tokens=5))
    run(engine, [expected])
    engine.add(prompt(40, 1), SamplingParams(max_tokens=20, n=3))
    engine.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        owner = {"plan": engine.scheduler, "launch": engine.runner, "wait": Launched}[part]
        patch.setattr(owner, part, interrupted)
        engine.step()
    assert not engine.busy and engine.pool.used == engine.pool.cached == 0
    engine.scheduler.check()
    [request] = engine.add(prompt(30, 0), SamplingParams(max_tokens=5))
    run(engine, [request])
    assert request.outputs == expected.outputs
