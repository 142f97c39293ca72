"""Log-probabilities of prompts are those of a plain pass, however the prompt is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aria import AriaForConditionalGeneration, Engine, SamplingParams
from aria.engine import prompt_logprobs
from aria.engine.runner import Runner
from aria.model.decoder import Decoder
from tests.helpers.tiny_core import core, plain_logits, prompt, run, with_image, work


def assert_scored(request, k: int) -> None:
    """All of a request's prompt, against one plain pass over it."""
    logprobs, ids = request.prompt_logprobs, torch.tensor(request.prompt[1:])
    expected = plain_logits(list(request.prompt), request.images)[:-1].log_softmax(-1)
    chosen = expected.gather(1, ids[:, None])
    assert logprobs.complete and len(logprobs.logprobs) == len(request.prompt)
    np.testing.assert_allclose(logprobs.logprobs[1:], chosen[:, 0], atol=1e-5)
    assert logprobs.ranks[1:].tolist() == ((expected > chosen).sum(-1) + 1).tolist()
    values, likeliest = expected.topk(k, dim=-1)
    np.testing.assert_allclose(logprobs.top_logprobs[1:], values, atol=1e-5)
    assert logprobs.top_ids[1:].tolist() == likeliest.tolist()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"step_tokens": 16, "mixed_step_tokens": 16}, {"cache_blocks": 14, "max_model_len": 200}],
    ids=["mixed", "small chunks", "preempted"],
)
def test_prompt_logprobs_equal_a_plain_pass(settings, fused, monkeypatch):
    launch = Runner.launch

    def launch_fused(self, plan):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "fused", staticmethod(lambda x_TD: fused))
            return launch(self, plan)

    monkeypatch.setattr(Runner, "launch", launch_fused)
    monkeypatch.setattr(prompt_logprobs, "TOGETHER", 7)
    engine = core(**settings)
    requests = []
    for seed in range(12):
        ids, images = work(seed)
        # Some beside them that ask for nothing of their prompts, and find them in the cache.
        wanted = None if seed % 4 == 0 else seed % 3
        params = SamplingParams(max_tokens=24, prompt_logprobs=wanted, logprobs=1 if seed % 2 else None)
        requests += engine.add(ids, params, images=images)
    run(engine, requests)
    for request in requests:
        if request.params.prompt_logprobs is None:
            assert request.prompt_logprobs is None
        else:
            assert_scored(request, request.params.prompt_logprobs)
    if "cache_blocks" in settings:
        assert engine.scheduler.preemptions > 0


def test_a_cached_prompt_is_computed_once_more():
    engine = core()
    ids, images = with_image(20, 40, 70, 3)
    asked = SamplingParams(max_tokens=4, prompt_logprobs=2)
    [plain] = engine.add(ids, SamplingParams(max_tokens=4), images=images)
    run(engine, [plain])
    for n in (1, 3):
        before = engine.scheduler.prefix_tokens
        requests = engine.add(ids, SamplingParams(max_tokens=4, prompt_logprobs=2, n=n), images=images)
        run(engine, requests)
        assert_scored(requests[0], 2)
        assert all(request.prompt_logprobs is None for request in requests[1:]), "one reading serves all answers"
        assert engine.scheduler.prefix_tokens - before == (n - 1) * (len(ids) // 16) * 16
        assert all(request.outputs == plain.outputs for request in requests)
    [after] = engine.add(ids, asked, images=images)
    run(engine, [after])
    assert after.cached_tokens == 0


def test_a_preempted_prompt_is_not_scored_twice():
    engine = core(step_tokens=16, mixed_step_tokens=16)
    [request] = engine.add(prompt(100, 1), SamplingParams(max_tokens=3, prompt_logprobs=0))
    for _ in range(3):
        engine.step()
    assert request.prompt_logprobs.known == 49 and not request.prompt_logprobs.complete
    engine.scheduler._preempt(request)
    engine.step()
    assert request.computed == 64, "three blocks come from the cache"
    run(engine, [request])
    assert_scored(request, 0)


def test_a_prompt_of_one_token_has_nothing_to_score():
    engine = core()
    [request] = engine.add([25], SamplingParams(max_tokens=2, prompt_logprobs=3))
    run(engine, [request])
    assert request.prompt_logprobs.complete


def test_logits_are_computed_in_portions(monkeypatch):
    seen = []
    of = prompt_logprobs.ScoredTokens.of
    monkeypatch.setattr(
        prompt_logprobs.ScoredTokens, "of", lambda logits, *rest: seen.append(len(logits)) or of(logits, *rest)
    )
    engine = core(step_tokens=384, max_model_len=400)
    [request] = engine.add(prompt(390, 1), SamplingParams(max_tokens=2, prompt_logprobs=0))
    run(engine, [request])
    assert max(seen) <= prompt_logprobs.TOGETHER and sum(seen) == 389


def test_results_contain_prompt_logprobs(model_folder):
    engine = Engine(model_folder, device="cpu")
    messages = [{"role": "user", "content": "hello world"}]
    prepared = engine.prepare(messages)
    [result] = engine.chat([messages], SamplingParams(max_tokens=0, prompt_logprobs=2))
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "length")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(prepared.ids), 0)
    with torch.no_grad():
        logits = AriaForConditionalGeneration(engine.model)(torch.tensor([prepared.ids])).logits[0].log_softmax(-1)
    first, *rest = result.prompt_logprobs
    assert first is None and [one.token_id for one in rest] == prepared.ids[1:]
    for place, one in enumerate(rest):
        assert abs(one.logprob - float(logits[place, one.token_id])) < 1e-4
        assert one.token == engine.processor.tokenizer.decode([one.token_id])
        assert one.rank == int((logits[place] > logits[place, one.token_id]).sum()) + 1
        assert [(top.token_id, top.rank) for top in one.top] == list(
            zip(logits[place].topk(2).indices.tolist(), (1, 2), strict=True)
        )
    [plain] = engine.chat([messages], SamplingParams(max_tokens=2))
    assert plain.prompt_logprobs is None
    assert engine.stats().completion_tokens == 2, "a token that was not requested does not count"
