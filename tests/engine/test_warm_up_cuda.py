"""After a warm-up, the engine compiles nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image

from aria import Engine, SamplingParams
from aria.ops.kernels import chunk_attention
from tests.helpers.gpu_models import WIDE

pytestmark = pytest.mark.gpu


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Kernels that Triton makes ready for the first time within the block, be it from its cache on disk."""
    from triton import knobs

    seen: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **found: seen.append(found["repr"])
    try:
        yield seen
    finally:
        knobs.runtime.jit_post_compile_hook = before


def test_steps_after_a_warm_up_compile_nothing(monkeypatch):
    config = replace(WIDE, text=replace(WIDE.text, vocab_size=4096, max_position_embeddings=20_480))
    planned = set()
    attend = chunk_attention._sdpa

    def watched(q, k, v, causal):
        planned.add((*((x.shape, x.stride()) for x in (q, k, v)), causal))
        return attend(q, k, v, causal)

    monkeypatch.setattr(chunk_attention, "_sdpa", watched)
    engine = Engine(config, device="cuda", dtype=torch.bfloat16, max_batch=24, cache_tokens=100_000)
    with compilations() as first:
        engine.warm_up()
    # Kernels of this process may be there from other tests; of this shape most are not.
    assert first
    assert not engine.core.busy and engine.core.pool.free == engine.core.pool.total
    plans, choice = set(planned), random.Random(0)
    kinds = {}, {"logprobs": 2, "temperature": 1.0}, {"presence_penalty": 0.5}, {"prompt_logprobs": 1}
    with compilations() as later:
        for longest, requests in (50, 60), (700, 60), (5_000, 8), (18_000, 3):
            for seed in range(requests):
                ids = [choice.randrange(20, 4000) for _ in range(choice.randrange(1, longest))]
                params = SamplingParams(
                    max_tokens=choice.randrange(1, 9), ignore_eos=True, seed=seed, **choice.choice(kinds)
                )
                engine.queue(engine.prepare_text(ids), params)
                for _ in range(choice.randrange(4)):
                    engine.step()
            while engine.core.busy:
                engine.step()
        for size, limit in ((980, 700), 980), ((300, 200), 490):
            image = {"type": "image", "image": Image.new("RGB", size), "max_image_size": limit}
            engine.queue(engine.prepare([{"role": "user", "content": [image]}]), SamplingParams(max_tokens=2))
            while engine.core.busy:
                engine.step()
    assert later == []
    assert planned == plans


def test_decode_graphs_serve_sequences_of_any_length():
    """A graph captured with short sequences also reads the blocks of long ones."""
    engine = Engine(WIDE, device="cuda", dtype=torch.bfloat16, max_batch=4, cache_tokens=20_000)
    engine.warm_up()
    graphs = engine.core.runner._graphs._captured
    before = {key for key, graph in graphs.items() if graph is not None}
    engine.queue(engine.prepare_text(list(range(20, 4020)) * 2), SamplingParams(max_tokens=8, ignore_eos=True))
    while engine.core.busy:
        engine.step()
    assert {key for key, graph in graphs.items() if graph is not None} == before
