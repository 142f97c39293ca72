"""Engines that run at the same time on one GPU, each on a stream of its own, and what they must not share."""

from __future__ import annotations

import pytest
import torch

from aria.engine import SamplingParams
from aria.engine.core import EngineCore
from aria.engine.request import Request
from aria.engine.sampler import SamplerState
from aria.model import Aria
from aria.ops import PagedKV, rope_angles
from aria.ops.kernels import paged_attention
from tests.helpers.gpu_models import WIDE

pytestmark = pytest.mark.gpu


def make(model: Aria) -> EngineCore:
    return EngineCore(model, max_batch=16, max_model_len=2048, cache_blocks=300)


def add(core: EngineCore, seed: int) -> list[Request]:
    """Answers over long pasts, which several programs share out and count one another in."""
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for number in range(8):
        prompt = torch.randint(20, 4000, (900 + 100 * number,), generator=generator).tolist()
        params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=seed + number, ignore_eos=True)
        requests += core.add(prompt, params)
    return requests


def test_two_engines_on_two_streams_answer_as_alone():
    model = Aria.random(WIDE, dtype=torch.bfloat16, device="cuda")
    alone = []
    for seed in (0, 100):
        core = make(model)
        requests = add(core, seed)
        while core.unfinished:
            core.step()
        core.close()
        alone.append([request.outputs for request in requests])
    cores = [make(model), make(model)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    requests = [add(core, seed) for core, seed in zip(cores, (0, 100), strict=True)]
    while any(core.busy for core in cores):
        for core, stream in zip(cores, streams, strict=True):
            with torch.cuda.stream(stream):
                if core.busy:
                    core.step()
    assert [[request.outputs for request in some] for some in requests] == alone


def test_attention_on_two_streams_at_once():
    """With shared counters, programs of overlapping launches would mix up their partial results."""
    torch.manual_seed(0)
    H, K, S, M = 20, 128, 64, 64
    keys, values = torch.randn(2, M + 1, H, S, K, device="cuda", dtype=torch.bfloat16)
    blocks = (torch.randperm(M, device="cuda") + 1).int()[None]
    lengths = torch.tensor([M * S - 7], dtype=torch.int32, device="cuda")
    queries = torch.randn(2, 1, H, K, device="cuda", dtype=torch.bfloat16)
    cache = PagedKV(keys, values, rope_angles(1, K, 5e6, "cuda"))
    attend = paged_attention.paged_attention_triton
    expected = [attend(q, cache, blocks, lengths) for q in queries]
    counters = torch.zeros(2, H, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in range(200):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[n].append(attend(queries[n], cache._replace(arrivals=counters[n]), blocks, lengths))
    torch.cuda.synchronize()
    for one, right in zip(outputs, expected, strict=True):
        assert all(torch.equal(out, right) for out in one)
    assert not counters.any()


def test_samplers_on_two_streams_at_once():
    N, V = 8, 100_352
    states = [SamplerState(N, V, torch.device("cuda"), (9,)) for _ in range(2)]
    for n, state in enumerate(states):
        for row in range(N):
            state.set_row(row, SamplingParams(temperature=1.0, top_p=0.9, top_k=50 * n), 7 * n + row, [])
    logits = torch.randn(2, N, V, device="cuda", dtype=torch.bfloat16) * 3
    rows = torch.arange(N, dtype=torch.int32, device="cuda")
    expected = [state.sample(x, rows, rows) for state, x in zip(states, logits, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    drawn: list[list[torch.Tensor]] = [[], []]
    for _ in range(200):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                drawn[n].append(states[n].sample(logits[n], rows, rows))
    torch.cuda.synchronize()
    for some, right in zip(drawn, expected, strict=True):
        assert all(torch.equal(tokens, right) for tokens in some)
