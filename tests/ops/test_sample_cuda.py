"""Sampling and resizing on a GPU against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aria.engine import SamplingParams
from aria.engine.sampler import EndText, SamplerState
from aria.ops import sampling
from aria.processor import AriaImageProcessor
from aria.processor.image_inputs import load_crops, read_image_inputs

pytestmark = pytest.mark.gpu

V = 100_352
SETTINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 200, "top_p": 0.7, "min_p": 0.01},
)


def state_on(device: str, rows: int) -> SamplerState:
    state = SamplerState(rows, V, torch.device(device), (9,))
    for row in range(rows):
        state.set_row(row, SamplingParams(**SETTINGS[row % len(SETTINGS)]), 2**40 + row, [])
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 7, 200])
def test_tokens_equal_the_cpus(N, dtype):
    torch.manual_seed(N)
    logits = (torch.randn(N, V) * 3).to(dtype)
    rows = torch.arange(N, dtype=torch.int32)
    expected = state_on("cpu", N).sample(logits, rows, rows + 3)
    state = state_on("cuda", N)
    drawn = state.sample(logits.cuda(), rows.cuda(), rows.cuda() + 3).cpu()
    # The noise agrees to its last bits, so a draw may differ where two tokens are that close.
    assert (drawn != expected).sum() <= N // 100


def test_noise_agrees_with_the_cpu_to_its_last_bits():
    seeds, positions = torch.randint(-(2**31), 2**31, (2, 8), dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    expected = sampling.gumbel_noise(seeds[0], seeds[1], positions, V)
    got = sampling.gumbel_noise(seeds[0].cuda(), seeds[1].cuda(), positions.cuda(), V).cpu()
    assert (got - expected).abs().max() < 1e-5


def test_a_graph_draws_new_tokens_at_every_replay():
    N = 64
    state, logits = state_on("cuda", N), torch.randn(N, V, device="cuda").bfloat16()
    rows = torch.arange(N, dtype=torch.int32, device="cuda")
    positions = torch.zeros_like(rows)
    state.sample(logits, rows, positions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = state.sample(logits, rows, positions)
    for place in range(5):
        positions.fill_(place)
        logits.normal_()
        graph.replay()
        assert torch.equal(tokens, state.sample(logits, rows, positions))
    state.set_row(1, SamplingParams(), 0, [])
    graph.replay()
    assert tokens[1] == logits[1].index_fill(0, torch.tensor([9], device="cuda"), float("-inf")).argmax()


def test_penalties_biases_and_logprobs_equal_the_cpus():
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    params = SamplingParams(**penalties, logit_bias={5: 3.0}, min_tokens=50)
    logits, rows = torch.randn(2, V), torch.tensor([1, 0], dtype=torch.int32)
    results = []
    for device in ("cpu", "cuda"):
        state = SamplerState(3, V, torch.device(device), (9,))
        spelled = [b"<" if token % 9 == 4 else b"|" if token % 7 == 1 else b"a" for token in range(V)]
        ends = EndText.of("<|end|>", spelled, torch.device(device))
        state.set_row(1, params, 7, [1, 2, 3], [3, 4], end_ids=[8, 11], end_text=ends)
        for _ in range(3):
            adjusted = state.adjust_logits(logits.to(device), rows.to(device), rows.to(device), rows.to(device).long())
            tokens = state.sample(adjusted, rows.to(device), rows.to(device))
            state.count(rows.to(device), tokens)
        results.append([adjusted, tokens, *state.logprobs(logits.to(device), tokens, 5)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.cpu(), one)


@pytest.mark.parametrize("split", [None, "authors", "pad"])
def test_crops_have_pillows_bits(split):
    rng = np.random.default_rng(0)
    shapes = [(1080, 1920), (1080, 1920), (333, 98), (490, 490), (64, 1500)]
    sources = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    settings = [{"max_image_size": 490, "split_image": split is not None, "split_mode": split}] * len(sources)
    pictures = read_image_inputs(sources, AriaImageProcessor(), settings)
    for one, other in zip(load_crops(pictures, "cpu"), load_crops(pictures, "cuda"), strict=True):
        assert torch.equal(other.pixels.cpu(), one.pixels)
        assert other.extents == one.extents
