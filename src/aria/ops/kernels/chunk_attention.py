"""Attention of a chunk of a prompt: to its past in the paged cache, and causally to itself.

Our kernel takes any lengths. Where cuDNN is faster, on long chunks, it gets a round number of tokens, because it makes
a plan for every length, which takes tens of milliseconds: it attends to the past and to the chunk separately, and the
two results are merged by their log-sum-exps. The remaining tokens go to our kernel.

T tokens of the chunk, H heads, KV key/value heads, K head width, B blocks of the cache, S tokens of a block, M blocks
of the sequence, P tokens of a piece of its past.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria import private_api
from aria.ops import operations
from aria.ops.kernels.shared_memory import shared_memory
from aria.ops.registry import Where
from aria.ops.weights import Chunks, PagedKV

_LOG2_E = 1.4426950408889634


@triton.jit
def _meet(q, k, v, seen, top, total, acc, scale, MASKED: tl.constexpr):
    """One tile of keys: scores, running softmax, and values. ``seen`` is used if MASKED."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(seen, scores, -1e30)
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    old = tl.exp2(top - new_top)
    total = total * old + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _chunk_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, blocks_ptr, spans_ptr, out_ptr,
    q_stride, k_stride, v_stride, blocks_stride, scale,
    H: tl.constexpr, KV: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A tile of QUERIES tokens of one chunk and head, against tiles of KEYS. ROUND: see :func:`_even`, 0 for none."""
    head, chunk = tl.program_id(0), tl.program_id(2)
    chunk_start = tl.load(spans_ptr + chunk * 3).to(tl.int64)
    T = tl.load(spans_ptr + chunk * 3 + 1)
    past = tl.load(spans_ptr + chunk * 3 + 2)
    done = 0
    if ROUND:
        done = T // ROUND * ROUND
        done = tl.where((past % ROUND == 0) & (done + past >= 2 * ROUND), done, 0)
    tiles = tl.cdiv(T - done, QUERIES)
    if tl.program_id(1) >= tiles:
        return
    first = done + (tiles - 1 - tl.program_id(1)) * QUERIES  # the longest first
    kv = head // (H // KV)
    q_ptr += chunk_start * q_stride + head * K
    k_ptr += chunk_start * k_stride + kv * K
    v_ptr += chunk_start * v_stride + kv * K
    out_ptr += (chunk_start * H + head) * K
    blocks_ptr += chunk * blocks_stride
    dim = tl.arange(0, K)
    token = first + tl.arange(0, QUERIES)
    key = tl.arange(0, KEYS)
    rows = token.to(tl.int64)[:, None]
    q = tl.load(q_ptr + rows * q_stride + dim[None, :], mask=token[:, None] < T, other=0.0)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, K), tl.float32)

    whole = past // KEYS * KEYS
    offsets = key[:, None] * K + dim[None, :]
    ahead = tl.load(blocks_ptr, mask=past > 0, other=0)
    for begin in tl.range(0, whole, KEYS, num_stages=STAGES):
        block = ahead.to(tl.int64)  # loaded a tile ahead, so that keys and values need not wait for it
        ahead = tl.load(blocks_ptr + (begin + KEYS) // S, mask=begin + KEYS < past, other=0)
        place = ((block * KV + kv) * S + begin % S) * K
        k = tl.load(keys_ptr + place + offsets)
        v = tl.load(values_ptr + place + offsets)
        top, total, acc = _meet(q, k, v, True, top, total, acc, scale, False)
    if whole < past:
        block = tl.load(blocks_ptr + whole // S).to(tl.int64)
        place = ((block * KV + kv) * S + whole % S) * K
        there = whole + key < past
        k = tl.load(keys_ptr + place + offsets, mask=there[:, None], other=0.0)
        v = tl.load(values_ptr + place + offsets, mask=there[:, None], other=0.0)
        top, total, acc = _meet(q, k, v, there[None, :], top, total, acc, scale, True)

    before = first // KEYS * KEYS
    for begin in tl.range(0, before, KEYS, num_stages=STAGES):
        place = (begin + key).to(tl.int64)[:, None]
        k = tl.load(k_ptr + place * k_stride + dim[None, :])
        v = tl.load(v_ptr + place * v_stride + dim[None, :])
        top, total, acc = _meet(q, k, v, True, top, total, acc, scale, False)
    for begin in tl.range(before, tl.minimum(first + QUERIES, T), KEYS, num_stages=STAGES):
        place = (begin + key).to(tl.int64)[:, None]
        there = place < T
        k = tl.load(k_ptr + place * k_stride + dim[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + place * v_stride + dim[None, :], mask=there, other=0.0)
        seen = (begin + key)[None, :] <= token[:, None]
        top, total, acc = _meet(q, k, v, seen, top, total, acc, scale, True)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * H * K + dim[None, :], out, mask=token[:, None] < T)


@triton.jit
def _gather_kernel(keys_ptr, values_ptr, blocks_ptr, out_ptr, KV: tl.constexpr, SIZE: tl.constexpr):
    """One head's part of one block, SIZE elements, of the keys and of the values."""
    page, kv = tl.program_id(0), tl.program_id(1)
    element = tl.arange(0, SIZE)
    source = (tl.load(blocks_ptr + page).to(tl.int64) * KV + kv) * SIZE + element
    pages = tl.num_programs(0)
    target = (kv * pages + page).to(tl.int64) * SIZE + element
    tl.store(out_ptr + target, tl.load(keys_ptr + source))
    tl.store(out_ptr + target + KV * pages.to(tl.int64) * SIZE, tl.load(values_ptr + source))


@triton.jit
def _merge_kernel(
    one_ptr, one_lse_ptr, two_ptr, two_lse_ptr, out_ptr, lse_ptr, T,
    H: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head: two results weighted by their sums of exponentials."""
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < T
    one_lse = tl.load(one_lse_ptr + head * T + token, mask=inside, other=0.0)
    two_lse = tl.load(two_lse_ptr + head * T + token, mask=inside, other=0.0)
    top = tl.maximum(one_lse, two_lse)
    lse = top + tl.log(tl.exp(one_lse - top) + tl.exp(two_lse - top))
    tl.store(lse_ptr + head * T + token, lse, mask=inside)
    offsets = (token.to(tl.int64) * H + head)[:, None] * K + tl.arange(0, K)[None, :]
    one = tl.load(one_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    two = tl.load(two_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    merged = one * tl.exp(one_lse - lse)[:, None] + two * tl.exp(two_lse - lse)[:, None]
    tl.store(out_ptr + offsets, merged, mask=inside[:, None])


_ROUND = 4096
"""cuDNN gets multiples of this many tokens."""
_PIECE = 16384
"""Tokens of the past that are gathered at a time."""


def fits(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cache: PagedKV, *_: object) -> bool:
    """Whether the kernel takes these sizes: powers of two for a head's width, from 16 to 128, and for a block.

    In float32 up to 64: tensor cores do not multiply it exactly, and wide heads are slow to compute and to compile.
    """
    K, S = q_THK.shape[2], cache.keys.shape[2]
    widest = 64 if q_THK.is_cuda and q_THK.dtype == torch.float32 else 128
    return 16 <= K <= widest and all(size & (size - 1) == 0 for size in (K, S))


@operations.chunks_attention.register(Where.INFERENCE, fits=fits)
def chunks_attention_triton(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cache: PagedKV, chunks: Chunks) -> Tensor:
    """One launch for chunks of all lengths; cuDNN for long ones whose pasts the host knows."""
    blocks_NM, lengths, pasts, spans_N3 = chunks
    T, H, K = q_THK.shape
    keys_BHSK, values_BHSK, *_ = cache
    assert fits(q_THK, k_THK, v_THK, cache), f"no kernel for queries {tuple(q_THK.shape)}, cache {keys_BHSK.shape}"
    assert keys_BHSK.is_contiguous() and values_BHSK.is_contiguous(), "the cache of a layer must be contiguous"
    assert all(x.stride()[1:] == (K, 1) for x in (q_THK, k_THK, v_THK)), "heads of a token must be adjacent"
    assert len(lengths) == len(blocks_NM) and sum(lengths) == T, "lengths of chunks do not add up to the tokens"
    if pasts is None:
        assert spans_N3 is not None, "neither pasts nor spans are known"
        out = torch.empty(T, H, K, dtype=q_THK.dtype, device=q_THK.device)
        _in_tiles(q_THK, k_THK, v_THK, cache, blocks_NM, spans_N3, max(lengths), 0, out)
        return out
    round_to = _ROUND if _cudnn(q_THK, k_THK) else 0
    even = [_even(length, past, round_to) for length, past in zip(lengths, pasts, strict=True)]
    if even == [T]:
        return _in_parts(q_THK, k_THK, v_THK, cache, blocks_NM[0], pasts[0])
    out = torch.empty(T, H, K, dtype=q_THK.dtype, device=q_THK.device)
    start = 0
    for chunk, (length, count) in enumerate(zip(lengths, even, strict=True)):
        if count:
            own = slice(start, start + count)
            q, k, v = q_THK[own], k_THK[own], v_THK[own]
            out[own] = _in_parts(q, k, v, cache, blocks_NM[chunk], pasts[chunk])
        start += length
    rest = max(length - count for length, count in zip(lengths, even, strict=True))
    if rest:
        spans = _spans(lengths, pasts, q_THK.device) if spans_N3 is None else spans_N3
        _in_tiles(q_THK, k_THK, v_THK, cache, blocks_NM, spans, rest, round_to, out)
    return out


def plan(keys_BHSK: Tensor, heads: int, chunk: int, longest: int) -> None:
    """Let cuDNN make its plans for all chunks of up to ``chunk`` tokens in sequences of up to ``longest``.

    Needs the memory of such a chunk's attention.
    """
    KV, K = keys_BHSK.shape[1], keys_BHSK.shape[3]
    # As in the decoder: v is a part of the fused projection, q and k are rotated and separate.
    fused = keys_BHSK.new_empty(chunk // _ROUND * _ROUND, heads + 2 * KV, K)
    q, k, v = fused.new_empty(len(fused), heads, K), fused.new_empty(len(fused), KV, K), fused[:, heads + KV :]
    if not _cudnn(q, k):
        return
    for tokens in range(_ROUND, len(fused) + 1, _ROUND):
        own_q, own_k, own_v = (x[:tokens].transpose(0, 1) for x in (q, k, v))
        pasts = range(_ROUND, min(_PIECE, longest - tokens) + 1, _ROUND)
        if pasts or _even(tokens, 0, _ROUND):
            _sdpa(own_q, own_k, own_v, causal=True)
        for past in pasts:
            past_k, past_v = fused.new_empty(2, KV, past, K)
            _sdpa(own_q, past_k, past_v, causal=False)


def _even(length: int, past: int, round_to: int) -> int:
    """Tokens of a chunk that cuDNN takes: all but a remainder, if the past is a round number too and it is faster."""
    if not round_to or past % round_to:
        return 0
    even = length // round_to * round_to
    return even if even + past >= 2 * round_to else 0


def _spans(lengths: Sequence[int], pasts: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``(N, 3)``: first token, length and past of each chunk."""
    starts = accumulate(lengths[:-1], initial=0)
    return torch.tensor(list(zip(starts, lengths, pasts, strict=True)), dtype=torch.int32, device=device)


def _cudnn(q_THK: Tensor, k_THK: Tensor) -> bool:
    return (
        q_THK.is_cuda
        and q_THK.dtype in (torch.bfloat16, torch.float16)
        and q_THK.shape[1:] == k_THK.shape[1:]
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(q_THK.device) >= (9, 0)
    )


def _in_parts(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cache: PagedKV, blocks_M: Tensor, past: int) -> Tensor:
    """cuDNN on the chunk itself and on pieces of its past, merged."""
    T, H, K = q_THK.shape
    keys_BHSK, values_BHSK, *_ = cache
    S = keys_BHSK.shape[2]
    q, k, v = (x.transpose(0, 1) for x in (q_THK, k_THK, v_THK))
    out_THK, lse_HT = _sdpa(q, k, v, causal=True)
    for start in range(0, past, _PIECE):
        count = min(_PIECE, past - start)
        gathered = torch.empty(2, H, count, K, dtype=q.dtype, device=q.device)
        _gather_kernel[count // S, H](
            keys_BHSK, values_BHSK, blocks_M[start // S :], gathered, KV=H, SIZE=S * K, num_warps=8
        )  # fmt: skip
        parts = out_THK, lse_HT, *_sdpa(q, gathered[0], gathered[1], causal=False)
        # Not in place: threads of a program read the same log-sum-exps.
        out_THK, lse_HT = torch.empty_like(out_THK), torch.empty_like(lse_HT)
        _merge_kernel[triton.cdiv(T, 16), H](*parts, out_THK, lse_HT, T, H=H, K=K, TOKENS=16)
    return out_THK


def _sdpa(q_HTK: Tensor, k_HPK: Tensor, v_HPK: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention: outputs ``(T, H, K)`` and natural log-sum-exps ``(H, T)`` in float32, both contiguous."""
    out, lse, *_ = private_api.cudnn_attention(q_HTK[None], k_HPK[None], v_HPK[None], None, True, 0.0, causal, False)
    return out[0].transpose(0, 1).contiguous(), lse.reshape(lse.shape[1:3])


def _tiles(q_THK: Tensor, tokens: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, stages and warps."""
    roomy = q_THK.element_size() == 2 and shared_memory(q_THK.device) >= 160 << 10
    if not roomy:
        return 64, 32, 2, 4
    return (128, 64, 3, 8) if tokens > 512 else (64, 64, 3, 4)


def _in_tiles(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cache: PagedKV, blocks_NM: Tensor, spans_N3: Tensor,
    longest: int, round_to: int, out_THK: Tensor,
) -> None:  # fmt: skip
    """Our kernel, for the tokens that cuDNN does not take: at most ``longest`` of a chunk."""
    _, H, K = q_THK.shape
    keys_BHSK, values_BHSK, *_ = cache
    _, KV, S, _ = keys_BHSK.shape
    queries, keys, stages, warps = _tiles(q_THK, longest)
    _chunk_kernel[H, triton.cdiv(longest, queries), len(spans_N3)](
        q_THK, k_THK, v_THK, keys_BHSK, values_BHSK, blocks_NM, spans_N3, out_THK,
        q_THK.stride(0), k_THK.stride(0), v_THK.stride(0), blocks_NM.stride(0), K**-0.5 * _LOG2_E,
        H=H, KV=KV, S=S, K=K, QUERIES=queries, KEYS=min(keys, S), STAGES=stages, ROUND=round_to,
        num_warps=warps,
    )  # fmt: skip
