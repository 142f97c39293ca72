"""The decoder's attention against its references: kernels in Triton's interpreter, and the CPU's version."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

pytest.importorskip("triton")

from aria.ops import Chunks, PagedKV, reference
from aria.ops.attention import decode_attention_per_sequence, paged_attention_per_sequence
from aria.ops.kernels import chunk_attention, norm, paged_attention, rotary
from tests.helpers import interpreter  # noqa: F401  (fixes Triton's for current NumPy)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def paged(lengths, H=4, KV=4, K=32, S=16, M=None, dtype=torch.float32):
    """Random q, k, v of one token per sequence, a random cache, and block tables in random order."""
    N, M = len(lengths), M or max(lengths) // S + 1
    fused = torch.randn(N, H + 2 * KV, K, dtype=dtype)
    q, k, v = fused.split([H, KV, KV], dim=1)
    keys, values = torch.randn(2, N * M + 1, KV, S, K, dtype=dtype)
    blocks = (torch.randperm(N * M) + 1).view(N, M).int()
    return q, k, v, torch.tensor(lengths, dtype=torch.int32), blocks, keys, values


MANY = [3 * n % 50 for n in range(66)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "decode", [paged_attention.decode_attention_triton, decode_attention_per_sequence], ids=["kernel", "cpu"]
)
@pytest.mark.parametrize(
    "lengths, H, KV, K, S",
    [
        ([0], 2, 2, 32, 16),
        ([1, 15, 16, 17], 2, 2, 32, 16),
        ([0, 63, 64, 65, 130], 2, 1, 64, 64),
        ([500], 2, 2, 16, 16),
        ([3, 500, 0], 2, 1, 16, 16),
        (MANY, 1, 1, 16, 16),
    ],
)
def test_decode_attention(lengths, H, KV, K, S, decode):
    torch.manual_seed(0)
    q, k, v, positions, blocks, keys, values = paged(lengths, H, KV, K, S)
    angles = reference.rope_angles(512, K, 1e4)
    arrivals = torch.zeros(len(lengths) * H, dtype=torch.int32)
    cache = PagedKV(keys.clone(), values.clone(), angles, arrivals)
    expected = reference.decode_attention(q, k, v, positions, blocks, PagedKV(keys, values, angles))
    for _ in range(2):  # twice: the counters are zero again
        got = decode(q, k, v, positions, blocks, cache)
        assert not arrivals.any()
        assert relative_error(got, expected) < 1e-6
        torch.testing.assert_close(cache.keys, keys)
        torch.testing.assert_close(cache.values, values)


@pytest.mark.parametrize(
    "attend", [paged_attention.paged_attention_triton, paged_attention_per_sequence], ids=["kernel", "cpu"]
)
@pytest.mark.parametrize("H, KV", [(4, 4), (6, 2)])
def test_paged_attention(H, KV, attend):
    torch.manual_seed(1)
    q, _, _, lengths, blocks, keys, values = paged([1, 17, 200, 64], H, KV, S=64)
    q = q.contiguous()
    cache = PagedKV(keys, values, reference.rope_angles(1, 32, 1e4))
    got = attend(q, cache, blocks, lengths)
    assert relative_error(got, reference.paged_attention(q, cache, blocks, lengths)) < 1e-6


@pytest.mark.parametrize("T, H, KV, K", [(1, 4, 4, 16), (37, 6, 2, 32)])
def test_rotate_and_cache(T, H, KV, K):
    torch.manual_seed(T)
    q, k, v = torch.randn(T, H + 2 * KV, K).split([H, KV, KV], dim=1)
    positions = torch.randint(0, 100, (T,), dtype=torch.int32)
    slots = (torch.randperm(64)[:T] + 16).int()
    angles = reference.rope_angles(100, K, 1e4)
    keys, values = torch.randn(2, 5, KV, 16, K)
    cache = PagedKV(keys.clone(), values.clone(), angles)
    expected = reference.rotate_and_cache(q, k, v, positions, slots, PagedKV(keys, values, angles))
    got = rotary.rotate_and_cache_triton(q, k, v, positions, slots, cache)
    for ours, theirs in zip((*got, cache.keys, cache.values), (*expected, keys, values), strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("T, D", [(1, 64), (5, 80)])
def test_rms_norm(T, D):
    torch.manual_seed(T)
    x, weight = torch.randn(2 * T, D)[::2], torch.rand(D) + 0.5
    assert relative_error(norm.rms_norm_triton(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) < 1e-6


@pytest.mark.parametrize("T, past", [(1, 0), (37, 0), (16, 16), (50, 37), (130, 100), (1, 70)])
@pytest.mark.parametrize("H, KV", [(2, 2), (4, 2)])
def test_chunk_attention(T, past, H, KV):
    torch.manual_seed(T)
    S, K, M = 16, 16, -(-(past + T) // 16)
    q, k, v = torch.randn(T, H + 2 * KV, K).split([H, KV, KV], dim=1)
    keys, values = torch.randn(2, M + 1, KV, S, K)
    blocks = (torch.randperm(M) + 1).int()
    cache = PagedKV(keys, values, reference.rope_angles(1, K, 1e4))
    expected = reference.chunk_attention(q, k, v, cache, blocks, past)
    got = chunk_attention.chunks_attention_triton(q, k, v, cache, Chunks(blocks[None], [T], [past]))
    assert relative_error(got, expected) < 1e-6


def plain_sdpa(q_HTK, k_HPK, v_HPK, causal):
    scores = q_HTK @ k_HPK.transpose(1, 2) * q_HTK.shape[2] ** -0.5
    if causal:
        scores = scores + torch.full(scores.shape[1:], float("-inf")).triu(1)
    return (scores.softmax(-1) @ v_HPK).transpose(0, 1).contiguous(), scores.logsumexp(-1)


@pytest.mark.parametrize("T, past", [(16, 0), (37, 0), (32, 48), (40, 80), (37, 21)])
def test_chunk_attention_in_parts(monkeypatch, T, past):
    """The path of long chunks, with small sizes and plain attention instead of cuDNN's."""
    for name, value in (("_ROUND", 16), ("_PIECE", 32), ("_cudnn", lambda q, k: True), ("_sdpa", plain_sdpa)):
        monkeypatch.setattr(chunk_attention, name, value)
    torch.manual_seed(T)
    S, H, K, M = 16, 3, 16, -(-(past + T) // 16)
    q, k, v = torch.randn(T, 3 * H, K).split(H, dim=1)
    keys, values = torch.randn(2, M + 1, H, S, K)
    blocks = (torch.randperm(M) + 1).int()
    cache = PagedKV(keys, values, reference.rope_angles(1, K, 1e4))
    expected = reference.chunk_attention(q, k, v, cache, blocks, past)
    got = chunk_attention.chunks_attention_triton(q, k, v, cache, Chunks(blocks[None], [T], [past]))
    assert relative_error(got, expected) < 1e-6


def test_chunks_attention(monkeypatch):
    """Chunks of several prompts at once, some of which cuDNN would take, wholly or partly."""
    for name, value in (("_ROUND", 16), ("_cudnn", lambda q, k: True), ("_sdpa", plain_sdpa)):
        monkeypatch.setattr(chunk_attention, name, value)
    torch.manual_seed(3)
    S, H, K, M, lengths, pasts = 16, 3, 16, 5, (5, 32, 16, 1, 40, 3), (0, 16, 3, 79, 32, 0)
    T, N = sum(lengths), len(lengths)
    q, k, v = torch.randn(T, 3 * H, K).split(H, dim=1)
    keys, values = torch.randn(2, N * M + 1, H, S, K)
    blocks = (torch.randperm(N * M) + 1).view(N, M).int()
    cache = PagedKV(keys, values, reference.rope_angles(1, K, 1e4))
    expected = reference.chunks_attention(q, k, v, cache, Chunks(blocks, lengths, pasts))
    starts = [sum(lengths[:n]) for n in range(N)]
    spans = torch.tensor(list(zip(starts, lengths, pasts, strict=True))).int()
    for known in ((pasts,), (pasts, spans), (None, spans)):
        got = chunk_attention.chunks_attention_triton(q, k, v, cache, Chunks(blocks, lengths, *known))
        assert relative_error(got, expected) < 1e-6
