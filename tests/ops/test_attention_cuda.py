"""On a GPU: the decoder's attention kernels, natively and inside CUDA graphs, against their references in float64."""

from __future__ import annotations

import pytest
import torch

from aria.ops import Chunks, PagedKV, reference

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from aria.ops.kernels import chunk_attention, norm, paged_attention, rotary  # noqa: E402

S, POSITIONS = 64, 8192
LENGTHS = [0, 1, 63, 64, 65, 128, 4097, 8000]
ERROR = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def wide(*tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


def paged(lengths, H, KV, K, dtype):
    """Random q, k and v of one token per sequence, positions, shuffled block tables and a cache."""
    M = max(lengths) // S + 1
    count = len(lengths) * M
    q, k, v = torch.randn(len(lengths), H + 2 * KV, K, device="cuda", dtype=dtype).split([H, KV, KV], dim=1)
    keys, values = torch.randn(2, count + 1, KV, S, K, device="cuda", dtype=dtype)
    blocks = (torch.randperm(count, device="cuda") + 1).view(-1, M).int()
    positions = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    return q, k, v, positions, blocks, PagedKV(keys, values, reference.rope_angles(POSITIONS, K, 5e6, "cuda"))


def exactly(inputs):
    """The same in float64, with a separate cache."""
    cache = inputs[5]
    return *wide(*inputs[:5]), _double(cache)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("H, KV, K", [(20, 20, 128), (8, 2, 64)])
def test_decode_attention(H, KV, K, dtype):
    torch.manual_seed(0)
    inputs = paged(LENGTHS, H, KV, K, dtype)
    exact = exactly(inputs)
    expected = reference.decode_attention(*exact)
    for _ in range(3):
        assert relative_error(paged_attention.decode_attention_triton(*inputs), expected) < ERROR[dtype]
    assert relative_error(inputs[5].keys, exact[5].keys) < ERROR[dtype]
    assert torch.equal(inputs[5].values.double(), exact[5].values)


def test_decode_attention_in_a_graph():
    """The graph works for any lengths that its block tables allow, and leaves its counters at zero."""
    torch.manual_seed(1)
    inputs = paged(LENGTHS, 20, 20, 128, torch.bfloat16)
    positions = inputs[3]
    paged_attention.decode_attention_triton(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention.decode_attention_triton(*inputs)
    for _ in range(5):
        positions.random_(0, max(LENGTHS))
        expected = reference.decode_attention(*exactly(inputs))
        out.fill_(float("nan"))
        graph.replay()
        assert relative_error(out, expected) < ERROR[torch.bfloat16]


def test_paged_attention():
    torch.manual_seed(2)
    inputs = paged([1, 64, 65, 3000], 20, 20, 128, torch.bfloat16)
    (q, _, _, lengths, blocks, cache), exact = inputs, exactly(inputs)
    expected = reference.paged_attention(exact[0], exact[5], blocks, lengths)
    got = paged_attention.paged_attention_triton(q, cache, blocks, lengths)
    assert relative_error(got, expected) < ERROR[torch.bfloat16]


def chunks_by_head(q, k, v, cache, chunks):
    """The reference in float64, head by head: the scores of all heads would not fit into memory."""
    heads = zip(*(x.split(1, dim=1) for x in (q, k, v, cache.keys, cache.values)), strict=True)
    wider = ((*wide(q, k, v), cache._replace(keys=keys, values=values)) for q, k, v, keys, values in heads)
    return torch.cat([reference.chunks_attention(q, k, v, _double(own), chunks) for q, k, v, own in wider], dim=1)


def _double(cache):
    return cache._replace(keys=cache.keys.double(), values=cache.values.double())


@pytest.mark.parametrize(
    "lengths, pasts",
    [
        ([1], [0]),
        ([1], [4097]),
        ([63], [5]),
        ([64, 129, 1000], [64, 127, 1000]),
        ([2048], [0]),
        ([8500], [0]),
        ([4096], [4096]),
        ([100, 4096, 1, 9000, 8192, 37], [0, 4096, 300, 0, 0, 64]),
    ],
)
@pytest.mark.parametrize("dtype", list(ERROR))
def test_chunks_attention(lengths, pasts, dtype):
    torch.manual_seed(sum(lengths))
    H, K, N = 3, 64 if dtype == torch.float32 else 128, len(lengths)
    M = max(-(-(length + past) // S) for length, past in zip(lengths, pasts, strict=True))
    q, k, v = torch.randn(sum(lengths), 3 * H, K, device="cuda", dtype=dtype).split(H, dim=1)
    keys, values = torch.randn(2, N * M + 1, H, S, K, device="cuda", dtype=dtype)
    if not any(pasts):
        keys, values = keys * float("nan"), values * float("nan")  # they must not be read
    blocks = (torch.randperm(N * M, device="cuda") + 1).view(N, M).int()
    cache, chunks = PagedKV(keys, values, reference.rope_angles(1, K, 5e6, "cuda")), Chunks(blocks, lengths, pasts)
    got = chunk_attention.chunks_attention_triton(q, k, v, cache, chunks)
    expected = chunks_by_head(q, k, v, cache, chunks)
    # A norm over many tokens would hide a few wrong ones.
    for ours, theirs in zip(got.split(lengths), expected.split(lengths), strict=True):
        assert relative_error(ours[-1], theirs[-1]) < 2 * ERROR[dtype]
        assert relative_error(ours, theirs) < ERROR[dtype]


@pytest.mark.parametrize("T", [1, 100, 4097])
def test_rotate_and_cache(T):
    torch.manual_seed(T)
    H, K, M = 20, 128, -(-T // S)
    q, k, v = torch.randn(T, 3 * H, K, device="cuda", dtype=torch.bfloat16).split(H, dim=1)
    keys, values = torch.randn(2, M + 1, H, S, K, device="cuda", dtype=torch.bfloat16)
    positions = torch.randint(0, POSITIONS, (T,), device="cuda", dtype=torch.int32)
    slots = (torch.randperm(M * S, device="cuda")[:T] + S).int()
    angles = reference.rope_angles(POSITIONS, K, 5e6, "cuda")
    cache = PagedKV(keys, values, angles)
    exact = _double(cache)
    expected = reference.rotate_and_cache(*wide(q, k, v), positions, slots, exact)
    got = rotary.rotate_and_cache_triton(q, k, v, positions, slots, cache)
    for ours, theirs in zip((*got, keys, values), (*expected, exact.keys, exact.values), strict=True):
        assert relative_error(ours, theirs) < ERROR[torch.bfloat16]


@pytest.mark.parametrize("T", [1, 1000])
def test_rms_norm(T):
    torch.manual_seed(T)
    x = torch.randn(T, 2560, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(2560, device="cuda", dtype=torch.bfloat16) + 0.5
    assert relative_error(norm.rms_norm_triton(x, weight, 1e-6), reference.rms_norm(*wide(x, weight), 1e-6)) < 4e-3
