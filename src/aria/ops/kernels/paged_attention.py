"""Attention of new tokens over a paged cache: one launch that rotates, writes the cache, attends and combines.

Reading the cache dominates. Each sequence's keys are split into tiles, and the tiles of all sequences are divided
evenly among the programs that fill the GPU, whatever the lengths; the last program of a sequence to finish combines the
results. Programs compute their share from the lengths alone, so one CUDA graph serves all lengths.

N sequences, H heads, KV key/value heads, K head width, B blocks of the cache, S tokens of a block, M blocks of the
longest sequence.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels.pdl import overlap, release, wait
from aria.ops.registry import Where
from aria.ops.weights import PagedKV

_LOWEST = tl.constexpr(-1e30)
"""Initial running maximum: finite, so that a state without keys can be compared and rescaled."""
_LOG2_E = 1.4426950408889634


class _Tuning(NamedTuple):
    """Tokens of a tile, minimum tiles of a share, target programs per multiprocessor, maximum registers per thread."""

    tile: int
    least: int
    programs: int
    registers: int | None


_WARPS = 4


def _tuning(sequences: int) -> _Tuning:
    """The fastest on an H100 from 128 to 65,536 tokens; see docs/lab/kernels.md."""
    if sequences == 1:
        return _Tuning(64, 1, 6, None)
    return _Tuning(64, 2, 8, 128) if sequences <= 16 else _Tuning(32, 2, 12, None)


@triton.jit
def _turn(row, cos, sin, K: tl.constexpr):
    """One head of one token, rotated in float32."""
    dim = tl.arange(0, K)
    x = tl.load(row + dim).to(tl.float32)
    partner = tl.load(row + (dim + K // 2) % K).to(tl.float32)
    return x * cos + tl.where(dim < K // 2, -partner, partner) * sin


@triton.jit
def _combine(states, partials, out, active, H: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr):
    """Combine the results of all programs of one head and sequence, weighted by their sums of exponentials."""
    dim = tl.arange(0, K)
    top = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((K,), tl.float32)
    for start in range(0, active, PIECE):
        split = start + tl.arange(0, PIECE)
        here = split < active
        # From L2: other programs wrote them.
        tops = tl.load(states + split * H * 2, mask=here, other=_LOWEST, cache_modifier=".cg")
        sums = tl.load(states + split * H * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            partials + split[:, None] * H * K + dim[None, :], mask=here[:, None], other=0.0, cache_modifier=".cg"
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top)
        old = tl.exp2(top - new_top)
        total = total * old + tl.sum(sums * weights, 0)
        acc = acc * old + tl.sum(parts * weights[:, None], 0)
        top = new_top
    tl.store(out + dim, (acc / total).to(out.dtype.element_ty))


@triton.jit
def _load_tile(keys_ptr, values_ptr, table, tile, cached, kv, KV, S, K: tl.constexpr, TILE: tl.constexpr):
    """Keys and values of one tile, and which of its tokens exist."""
    start = tile * TILE
    token = tl.arange(0, TILE)
    seen = start + token < cached
    block = tl.load(table + start // S).to(tl.int64)
    offsets = ((block * KV + kv) * S + start % S + token)[:, None] * K + tl.arange(0, K)[None, :]
    keys = tl.load(keys_ptr + offsets, mask=seen[:, None], other=0.0)
    values = tl.load(values_ptr + offsets, mask=seen[:, None], other=0.0)
    return keys, values, seen


@triton.jit
def _attend_tile(q, keys, values, seen, top, total, acc):
    """Add one tile to the running maxima, sums and outputs."""
    TILE: tl.constexpr = keys.shape[0]
    ROWS: tl.constexpr = acc.shape[0]
    scores = tl.where(seen, tl.sum(keys.to(tl.float32) * q[None, :], 1), float("-inf"))
    scores = tl.reshape(scores, (TILE // ROWS, ROWS))
    new_top = tl.maximum(top, tl.max(scores, 0))
    weights = tl.exp2(scores - new_top[None, :])
    old = tl.exp2(top - new_top)
    weighted = tl.reshape(weights, (TILE,))[:, None] * values.to(tl.float32)
    summed = tl.sum(tl.reshape(weighted, (TILE // ROWS, ROWS, acc.shape[1])), 0)
    return new_top, total * old + tl.sum(weights, 0), acc * old[:, None] + summed


@triton.jit
def _share(positions_ptr, N, item, programs, least, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Tiles of a share, the sequence of share ``item``, and that sequence's first share.

    Tiles are divided into ``programs`` equal shares of at least ``least`` tiles; every sequence has at least one share.
    """
    index = tl.arange(0, WIDTH)
    tiles = tl.cdiv(tl.load(positions_ptr + index, mask=index < N, other=0), TILE)
    share = tl.maximum(tl.cdiv(tl.sum(tiles, 0), programs), least)
    counts = tl.where(index < N, tl.maximum(tl.cdiv(tiles, share), 1), 0)
    n = tl.sum(((tl.cumsum(counts, 0) <= item) & (index < N)).to(tl.int32), 0)
    return share, n, tl.sum(tl.where(index < n, counts, 0), 0)


@triton.jit(do_not_specialize=["N", "programs"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, blocks_ptr, angles_ptr, keys_ptr, values_ptr, out_ptr,
    states_ptr, partials_ptr, arrivals_ptr, q_stride, k_stride, v_stride, blocks_stride, scale, N, programs,
    H: tl.constexpr, KV: tl.constexpr, S: tl.constexpr, K: tl.constexpr, LEAST: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, NEW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head and one share of one sequence's tiles.

    NEW: q, k and v are a new token's, not rotated; its key and value are not in the cache yet.
    """
    release(PDL)
    head, item = tl.program_id(0), tl.program_id(1)
    share, n, begin = _share(positions_ptr, N, item, programs, LEAST, TILE, WIDTH)
    if n >= N:
        return
    cached = tl.load(positions_ptr + n)  # keys in the cache, without the new token's
    tiles = tl.cdiv(cached, TILE)
    active = tl.maximum(tl.cdiv(tiles, share), 1)
    split = item - begin

    kv = head // (H // KV)
    dim = tl.arange(0, K)
    row = tl.arange(0, ROWS)
    table = blocks_ptr + n * blocks_stride
    first = split * share
    # Old keys were written in earlier steps: the first tile is loaded before the previous kernel ends.
    keys, values, seen = _load_tile(keys_ptr, values_ptr, table, first, cached, kv, KV, S, K, TILE)
    # Each of ROWS rows has its own maximum, sum and output, so that the loop needs no synchronisation.
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

    top, total, acc = _attend_tile(q, keys, values, seen, top, total, acc)
    for tile in range(first + 1, tl.minimum(first + share, tiles)):
        keys, values, seen = _load_tile(keys_ptr, values_ptr, table, tile, cached, kv, KV, S, K, TILE)
        top, total, acc = _attend_tile(q, keys, values, seen, top, total, acc)

    highest = tl.max(top, 0)
    weights = tl.exp2(top - highest)
    sums = tl.sum(total * weights, 0)
    result = tl.sum(acc * weights[:, None], 0)
    out = out_ptr + (line * H + head) * K
    if active == 1:
        tl.store(out + dim, (result / sums).to(out_ptr.dtype.element_ty))
    else:
        place = item * H + head
        tl.store(states_ptr + place * 2, highest)
        tl.store(states_ptr + place * 2 + 1, sums)
        tl.store(partials_ptr + place * K + dim, result)
        tl.debug_barrier()  # all threads have written before the program is counted as done
        if tl.atomic_add(arrivals_ptr + n * H + head, 1, sem="acq_rel") == active - 1:
            place = begin * H + head
            _combine(states_ptr + place * 2, partials_ptr + place * K, out, active, H, K, 16)
            tl.store(arrivals_ptr + n * H + head, 0)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _attend(
    q_NHK: Tensor, positions_N: Tensor, blocks_NM: Tensor, cache: PagedKV, new: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Launch the kernel; ``new`` are k and v of tokens that are not in the cache yet."""
    N, H, K = q_NHK.shape
    keys_BHSK, values_BHSK, angles, arrivals = cache
    _, KV, S, _ = keys_BHSK.shape
    k, v = new if new is not None else (q_NHK, q_NHK)
    assert fits(q_NHK, cache), f"no kernel for queries {tuple(q_NHK.shape)} and a cache {tuple(keys_BHSK.shape)}"
    assert keys_BHSK.is_contiguous() and values_BHSK.is_contiguous(), "the cache of a layer must be contiguous"
    assert all(x.stride()[1:] == (K, 1) for x in (q_NHK, k, v)), "heads of a token must be adjacent"
    assert blocks_NM.stride(1) == 1, "rows of the block table must be contiguous"
    device = q_NHK.device
    tuning = _tuning(N)
    programs = triton.cdiv(tuning.programs * _processors(device), H)  # for each head
    items = N + programs
    out = torch.empty(N, H, K, dtype=q_NHK.dtype, device=device)
    states = torch.empty(items * H, 2, dtype=torch.float32, device=device)
    partials = torch.empty(items * H, K, dtype=torch.float32, device=device)
    if arrivals is None:
        arrivals = torch.zeros(N * H, dtype=torch.int32, device=device)
    assert arrivals.numel() >= N * H, f"{N} sequences of {H} heads are more than {arrivals.numel()}"
    tile, vector = min(tuning.tile, S), 16 // q_NHK.element_size()
    _decode_kernel[H, items](
        q_NHK, k, v, positions_N, blocks_NM, angles, keys_BHSK, values_BHSK, out, states, partials, arrivals,
        q_NHK.stride(0), k.stride(0), v.stride(0), blocks_NM.stride(0), K**-0.5 * _LOG2_E, N, programs,
        H=H, KV=KV, S=S, K=K, LEAST=tuning.least, TILE=tile, ROWS=min(tile, max(1, _WARPS * 32 * vector // K)),
        WIDTH=1 if N == 1 else max(64, triton.next_power_of_2(N)),  # few widths: each is compiled separately
        NEW=new is not None, num_warps=_WARPS, maxnreg=tuning.registers,
        # Without new tokens, the previous kernel may have written the cache; with them, it did not write their past.
        **(overlap(device) if new is not None else {"PDL": False}),
    )  # fmt: skip
    return out


def fits(q_NHK: Tensor, cache: PagedKV, *_: object) -> bool:
    """Whether the kernel takes these sizes: powers of two for a head's width and for a block."""
    return all(8 <= size <= 256 and size & (size - 1) == 0 for size in (q_NHK.shape[2], cache.keys.shape[2]))


def _fits_decode(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, positions_N: Tensor, blocks_NM: Tensor, cache: PagedKV
) -> bool:
    return fits(q_NHK, cache)


@operations.paged_attention.register(Where.INFERENCE, fits=fits)
def paged_attention_triton(q_NHK: Tensor, cache: PagedKV, blocks_NM: Tensor, lengths_N: Tensor) -> Tensor:
    """One query of each sequence against its cached keys."""
    return _attend(q_NHK, lengths_N, blocks_NM, cache, None)


@operations.decode_attention.register(Where.INFERENCE, fits=_fits_decode)
def decode_attention_triton(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, positions_N: Tensor, blocks_NM: Tensor, cache: PagedKV
) -> Tensor:
    """One new token of each sequence.

    Where the GPU allows it the kernel starts early and reads positions, tables and old keys while the kernel before it
    still runs: these must not be what that one writes.
    """
    return _attend(q_NHK, positions_N, blocks_NM, cache, (k_NHK, v_NHK))
