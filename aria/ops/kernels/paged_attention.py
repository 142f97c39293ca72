"""Attention of new tokens over a paged cache: one launch that rotates, writes the cache, attends and combines.

N sequences, H heads, KV key/value heads, K head width, B blocks of the cache, S tokens of a block, M blocks of the
longest sequence. Reading the cache is all that costs; a sequence's tiles of keys are shared out among several programs,
and the last of them to finish combines what they found.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops.kernels.pdl import overlap, prefetch, release, wait

_LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts: finite, so that what has seen no key yet can be compared and rescaled."""
_LOG2_E = 1.4426950408889634
_TILE, _WARPS = 32, 2
_PROGRAMS = 8
"""Programs of one processor that a launch aims at."""
_LEAST = 2
"""Tiles of a share at least: below, combining costs more than it brings."""
_LONGEST = 8192
"""Tokens of a share at most."""


@triton.jit
def _turn(row, cos, sin, K: tl.constexpr):
    """One head of one token, rotated in float32."""
    dim = tl.arange(0, K)
    x = tl.load(row + dim).to(tl.float32)
    partner = tl.load(row + (dim + K // 2) % K).to(tl.float32)
    return x * cos + tl.where(dim < K // 2, -partner, partner) * sin


@triton.jit
def _combine(states, partials, out, active, K: tl.constexpr, PIECE: tl.constexpr):
    """Weigh the results of all programs of one head and sequence by their sums of exponentials."""
    dim = tl.arange(0, K)
    top = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((K,), tl.float32)
    for start in range(0, active, PIECE):
        split = start + tl.arange(0, PIECE)
        here = split < active
        # From L2: other programs wrote these.
        tops = tl.load(states + split * 2, mask=here, other=_LOWEST, cache_modifier=".cg")
        sums = tl.load(states + split * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            partials + split[:, None] * K + dim[None, :], mask=here[:, None], other=0.0, cache_modifier=".cg"
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top)
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(sums * weights, 0)
        acc = acc * old + tl.sum(parts * weights[:, None], 0)
        top = new_top
    tl.store(out + dim, (acc / total).to(out.dtype.element_ty))


@triton.jit
def _place(table, tile, kv, KV, S, K: tl.constexpr, TILE: tl.constexpr):
    """Where a tile of keys, and one of values, starts in the cache."""
    start = tile * TILE
    block = tl.load(table + start // S).to(tl.int64)
    return ((block * KV + kv) * S + start % S) * K


@triton.jit(do_not_specialize=["splits", "least"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, blocks_ptr, angles_ptr, keys_ptr, values_ptr, out_ptr,
    states_ptr, partials_ptr, arrivals_ptr, q_stride, k_stride, v_stride, blocks_stride, scale, splits, least,
    H: tl.constexpr, KV: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, NEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, and one of its shares of keys: ``splits`` at most, of ``least`` tiles or more.

    NEW: q, k and v are a new token's, not rotated; its key and value are not in the cache yet.
    """
    release(PDL)
    head, n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cached = tl.load(positions_ptr + n)  # keys that the cache holds; a new token's is not among them
    tiles = tl.cdiv(cached, TILE)
    share = tl.maximum(tl.cdiv(tiles, splits), least)
    active = tl.maximum(tl.cdiv(tiles, share), 1)
    if split >= active:
        return

    kv = head // (H // KV)
    dim = tl.arange(0, K)
    row = tl.arange(0, ROWS)
    table = blocks_ptr + n * blocks_stride
    first = split * share
    if PDL and first < tiles:
        # Earlier steps wrote these: they are on their way before the kernel before this one ends.
        LINE: tl.constexpr = 1024 // keys_ptr.dtype.element_ty.primitive_bitwidth
        offsets = _place(table, first, kv, KV, S, K, TILE) + tl.arange(0, TILE * K // LINE) * LINE
        prefetch(keys_ptr + offsets)
        prefetch(values_ptr + offsets)
    # Each of ROWS rows keeps its own maximum, sum and output, so that threads need not meet within the loop.
    top = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, K), tl.float32)
    line = n.to(tl.int64)
    if NEW:
        angles = angles_ptr + cached.to(tl.int64) * K
        cos = tl.load(angles + dim % (K // 2))
        sin = tl.load(angles + K // 2 + dim % (K // 2))
        wait(PDL)
        q = _turn(q_ptr + line * q_stride + head * K, cos, sin, K) * scale
        if split == active - 1:
            k = _turn(k_ptr + line * k_stride + kv * K, cos, sin, K).to(keys_ptr.dtype.element_ty)
            v = tl.load(v_ptr + line * v_stride + kv * K + dim)
            top = tl.where(row == 0, tl.sum(q * k.to(tl.float32), 0), _LOWEST)
            total = tl.where(row == 0, 1.0, 0.0)
            acc = tl.where(row[:, None] == 0, v.to(tl.float32)[None, :], 0.0)
            if head % (H // KV) == 0:
                block = tl.load(table + cached // S).to(tl.int64)
                slot = ((block * KV + kv) * S + cached % S) * K + dim
                tl.store(keys_ptr + slot, k)
                tl.store(values_ptr + slot, v)
    else:
        wait(PDL)
        q = tl.load(q_ptr + line * q_stride + head * K + dim).to(tl.float32) * scale

    token = tl.arange(0, TILE)
    for tile in range(first, tl.minimum(first + share, tiles)):
        seen = tile * TILE + token < cached
        offsets = _place(table, tile, kv, KV, S, K, TILE) + token[:, None] * K + dim[None, :]
        keys = tl.load(keys_ptr + offsets, mask=seen[:, None], other=0.0).to(tl.float32)
        values = tl.load(values_ptr + offsets, mask=seen[:, None], other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(keys * q[None, :], 1), float("-inf"))
        scores = tl.reshape(scores, (TILE // ROWS, ROWS))
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - new_top[None, :])
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(weights, 0)
        weighted = tl.reshape(weights, (TILE,))[:, None] * values
        acc = acc * old[:, None] + tl.sum(tl.reshape(weighted, (TILE // ROWS, ROWS, K)), 0)
        top = new_top

    highest = tl.max(top, 0)
    weights = tl.exp2(top - highest)
    sums = tl.sum(total * weights, 0)
    result = tl.sum(acc * weights[:, None], 0)
    pair = line * H + head
    out = out_ptr + pair * K
    if active == 1:
        tl.store(out + dim, (result / sums).to(out_ptr.dtype.element_ty))
    else:
        states = states_ptr + pair * splits * 2
        partials = partials_ptr + pair * splits * K
        tl.store(states + split * 2, highest)
        tl.store(states + split * 2 + 1, sums)
        tl.store(partials + split * K + dim, result)
        tl.debug_barrier()  # all threads have written before the program is counted
        if tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel") == active - 1:
            _combine(states, partials, out, active, K, 16)
            tl.store(arrivals_ptr + pair, 0)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters of programs that are done, one for each head and sequence; every launch leaves them at zero."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "decode once before a capture"
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def _split(pairs: int, longest: int, device: torch.device) -> tuple[int, int]:
    """Shares of keys that a head of a sequence is cut into at most, and tiles of a share at least.

    A graph's launch must serve all lengths, so neither depends on them: the first fills the GPU when all are long, and
    keeps the longest share short when few of many are. Programs without a share end at once.

    Args:
        pairs: sequences times heads.
        longest: tokens that the block tables have room for.
        device: where.
    """
    fill = -(-_PROGRAMS * _processors(device) // pairs)
    return max(1, min(max(fill, -(-longest // _LONGEST)), -(-longest // (_TILE * _LEAST)))), _LEAST


def _attend(
    q_NHK: Tensor, positions_N: Tensor, blocks_NM: Tensor, keys_BHSK: Tensor, values_BHSK: Tensor,
    new: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Launch; ``new`` are k, v and the angles of tokens that are not in the cache yet."""
    N, H, K = q_NHK.shape
    _, KV, S, _ = keys_BHSK.shape
    k, v, angles = new if new is not None else (q_NHK, q_NHK, q_NHK)
    assert fits(q_NHK, keys_BHSK), f"no kernel for queries {tuple(q_NHK.shape)} and a cache {tuple(keys_BHSK.shape)}"
    assert keys_BHSK.is_contiguous() and values_BHSK.is_contiguous(), "the cache of a layer is contiguous"
    assert all(x.stride()[1:] == (K, 1) for x in (q_NHK, k, v)), "heads of a token lie side by side"
    assert blocks_NM.stride(1) == 1, "block tables have rows"
    device = q_NHK.device
    splits, least = _split(N * H, blocks_NM.shape[1] * S, device)
    out = torch.empty(N, H, K, dtype=q_NHK.dtype, device=device)
    states = torch.empty(N * H * splits, 2, dtype=torch.float32, device=device)
    partials = torch.empty(N * H * splits, K, dtype=torch.float32, device=device)
    arrivals = _arrivals(device)
    assert arrivals.numel() >= N * H, f"{N} sequences of {H} heads are more than {arrivals.numel()}"
    tile, vector = min(_TILE, S), 16 // q_NHK.element_size()
    _decode_kernel[H, N, splits](
        q_NHK, k, v, positions_N, blocks_NM, angles, keys_BHSK, values_BHSK, out, states, partials, arrivals,
        q_NHK.stride(0), k.stride(0), v.stride(0), blocks_NM.stride(0), K**-0.5 * _LOG2_E, splits, least,
        H=H, KV=KV, S=S, K=K, TILE=tile, ROWS=min(tile, max(1, _WARPS * 32 * vector // K)), NEW=new is not None,
        num_warps=_WARPS, **overlap(device),
    )  # fmt: skip
    return out


def fits(q_NHK: Tensor, keys_BHSK: Tensor) -> bool:
    """Whether the kernel takes these widths: powers of two for a head and for a block."""
    return all(8 <= size <= 256 and size & (size - 1) == 0 for size in (q_NHK.shape[2], keys_BHSK.shape[2]))


def paged_attention(
    q_NHK: Tensor, keys_BHSK: Tensor, values_BHSK: Tensor, blocks_NM: Tensor, lengths_N: Tensor
) -> Tensor:
    """One query of each sequence against its cached keys; see :func:`aria.ops.reference.paged_attention`."""
    return _attend(q_NHK, lengths_N, blocks_NM, keys_BHSK, values_BHSK, None)


def decode_attention(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    positions_N: Tensor,
    blocks_NM: Tensor,
    angles_PK: Tensor,
    keys_BHSK: Tensor,
    values_BHSK: Tensor,
) -> Tensor:
    """One new token of each sequence; see :func:`aria.ops.reference.decode_attention`. One stream at a time."""
    return _attend(q_NHK, positions_N, blocks_NM, keys_BHSK, values_BHSK, (k_NHK, v_NHK, angles_PK))
