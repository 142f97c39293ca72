"""Attention within packed crops for heads a little wider than 64 (the vision encoder's 72), on Hopper, in Gluon.

Tensor cores multiply 16 columns at a time and tiles are powers of two, so a head of 72 is processed as 64 + 16 columns:
1.11 times the work, where 128 would be 1.78. Warps are specialised: one copies tiles of keys and values into a ring
buffer in shared memory; the others, in groups of four, have 64 queries each and take turns on the tensor cores.

P patches (queries, or keys and values), H heads, K head width, C crops.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from aria.ops import operations
from aria.ops.registry import Where
from aria.ops.segments import Segments

_LOW, _HIGH = gl.constexpr(64), gl.constexpr(16)
"""Columns of a head in its two tiles."""
_WIDTHS = (72, 80)
"""Head widths that fit those: rows are multiples of 16 bytes."""
_QUERIES = gl.constexpr(64)
"""Queries of a group of four warps."""
_KEYS = 128
"""Keys of a tile."""
_STAGES = 4
"""Tiles of keys and values in flight."""
_SPEED = {3: 1.0, 2: 0.91}
"""Relative speed by number of groups of four warps, with all of them busy (docs/lab/kernels.md)."""
_LOW_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
_HIGH_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=3)


@gluon.jit
def _find(tile, crop, first, grid, ROWS: gl.constexpr):
    """A tile's crop and that crop's first tile, looked for from an earlier crop on; the tile's head and first row; and
    the row at which the crop ends.

    A crop has a tile for each head and each ROWS queries, the last of a head perhaps not full.
    """
    queries, _, heads, tiles = grid
    tile = gl.minimum(tile, tiles - 1)  # groups look ahead, past the last tile too
    start = gl.load(queries + crop)
    end = gl.load(queries + crop + 1)
    blocks = gl.cdiv(end - start, ROWS)
    while tile >= first + blocks * heads:
        first += blocks * heads
        crop += 1
        start = end
        end = gl.load(queries + crop + 1)
        blocks = gl.cdiv(end - start, ROWS)
    head = (tile - first) // blocks
    return crop, first, head, start + (tile - first - head * blocks) * ROWS, end


@gluon.jit
def _copy(low, high, row, head, ready, to_low, to_high):
    tma.async_copy_global_to_shared(low, [row, head, 0], ready, to_low)
    tma.async_copy_global_to_shared(high, [row, head, _LOW], ready, to_high)


@gluon.jit
def _produce(inputs, barriers, buffers, grid, GROUPS: gl.constexpr):
    """The copying warp. It runs ahead of the others as far as the ring buffer allows, across tiles too.

    Keys are copied from the last tile to the first, so that the partial one comes first.
    """
    _, keys, _, tiles = grid
    q_low, q_high, k_low, k_high, v_low, v_high = inputs
    _, q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    ql, qh, kl, kh, vl, vh = buffers
    STAGES: gl.constexpr = kl.shape[0]
    TILE: gl.constexpr = kl.shape[1]
    crop = 0
    first = 0
    done = 0
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        crop, first, head, row, _row_end = _find(tile, crop, first, grid, _QUERIES * GROUPS)
        key = gl.load(keys + crop)
        key_end = gl.load(keys + crop + 1)
        half = done % 2
        mbarrier.wait(q_free.index(half), (done // 2 & 1) ^ 1)
        mbarrier.expect(q_ready.index(half), GROUPS * (q_low.block_type.nbytes + q_high.block_type.nbytes))
        for group in gl.static_range(GROUPS):
            place = half * GROUPS + group
            _copy(q_low, q_high, row + group * _QUERIES, head, q_ready.index(half), ql.index(place), qh.index(place))
        done += 1  # noqa: SIM113
        steps = gl.cdiv(key_end - key, TILE)
        for step in range(steps):
            at = key + (steps - 1 - step) * TILE
            stage = count % STAGES
            parity = (count // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(stage), parity)
            mbarrier.expect(k_ready.index(stage), k_low.block_type.nbytes + k_high.block_type.nbytes)
            _copy(k_low, k_high, at, head, k_ready.index(stage), kl.index(stage), kh.index(stage))
            mbarrier.wait(v_free.index(stage), parity)
            mbarrier.expect(v_ready.index(stage), v_low.block_type.nbytes + v_high.block_type.nbytes)
            _copy(v_low, v_high, at, head, v_ready.index(stage), vl.index(stage), vh.index(stage))
            count += 1


@gluon.jit
def _scores(ql, qh, kl, kh, old):
    """Start ``q @ k.T`` into the registers of ``old``, whose values are overwritten."""
    TILE: gl.constexpr = kl.shape[0]
    s = warpgroup_mma(ql, kl.reshape([TILE, _LOW]).permute((1, 0)), old, use_acc=False, is_async=True)
    return warpgroup_mma(qh, kh.reshape([TILE, _HIGH]).permute((1, 0)), s, is_async=True)


@gluon.jit
def _values(p, vl, vh, low, high):
    """Start adding ``p @ v``, of both tiles of columns."""
    TILE: gl.constexpr = vl.shape[0]
    LEFT_LOW: gl.constexpr = gl.DotOperandLayout(0, low.type.layout, 2)
    LEFT_HIGH: gl.constexpr = gl.DotOperandLayout(0, high.type.layout, 2)
    left = gl.convert_layout(p.to(vl.dtype), LEFT_LOW)
    low = warpgroup_mma(left, vl.reshape([TILE, _LOW]), low, is_async=True)
    high = warpgroup_mma(gl.convert_layout(left, LEFT_HIGH), vh.reshape([TILE, _HIGH]), high, is_async=True)
    return low, high


@gluon.jit
def _scale_rows(x, factor):
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _store(out, stride, x, row, row_end, first: gl.constexpr, K: gl.constexpr):
    rows = row + gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))
    columns = first + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    inside = (rows < row_end)[:, None] & (columns < K)[None, :]
    gl.store(out + rows.to(gl.int64)[:, None] * stride + columns[None, :], x.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _attend(ql, qh, memory, mine, next_group, keys, count, turn, scale):
    """One group's 64 queries over all keys of their crop; takes ``steps + 1`` turns.

    A turn is ``p @ v`` of one tile and ``q @ k.T`` of the next. Between turns comes the softmax, while other groups
    have the tensor cores. Returns both tiles of columns, still under way, what to divide them by, and the last stage.
    """
    kl, kh, vl, vh, k_ready, k_free, v_ready, v_free = memory
    STAGES: gl.constexpr = kl.shape[0]
    TILE: gl.constexpr = kl.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    low = gl.zeros([_QUERIES, _LOW], gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _LOW, 16]))
    high = gl.zeros([_QUERIES, _HIGH], gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HIGH, 16]))
    p = gl.zeros([_QUERIES, TILE], gl.float32, layout=SCORES)
    steps = gl.cdiv(keys, TILE)
    stage = count % STAGES
    mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
    mbarrier.wait(mine, turn & 1)
    s = _scores(ql, qh, kl.index(stage), kh.index(stage), p)
    mbarrier.arrive(next_group)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(stage))
    column = (steps - 1) * TILE + gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    s = gl.where((column < keys)[None, :], s, float("-inf"))
    top = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - top[:, None])
    total = gl.sum(p, 1)
    for step in range(1, steps):
        after = (count + step) % STAGES
        mbarrier.wait(v_ready.index(stage), (count + step - 1) // STAGES & 1)
        mbarrier.wait(mine, (turn + step) & 1)
        low, high = _values(p, vl.index(stage), vh.index(stage), low, high)
        mbarrier.wait(k_ready.index(after), (count + step) // STAGES & 1)
        # Waiting here frees the registers of p, without which three groups do not fit.
        low, high = warpgroup_mma_wait(0, deps=(low, high))
        s = _scores(ql, qh, kl.index(after), kh.index(after), p)
        mbarrier.arrive(next_group)
        mbarrier.arrive(v_free.index(stage))
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(after))
        new_top = gl.maximum(top, gl.max(s, 1) * scale)
        fade = gl.exp2(top - new_top)
        p = gl.exp2(s * scale - new_top[:, None])
        total = total * fade + gl.sum(p, 1)
        top = new_top
        low = _scale_rows(low, fade)
        high = _scale_rows(high, fade)
        stage = after
    mbarrier.wait(v_ready.index(stage), (count + steps - 1) // STAGES & 1)
    mbarrier.wait(mine, (turn + steps) & 1)
    low, high = _values(p, vl.index(stage), vh.index(stage), low, high)
    mbarrier.arrive(next_group)
    return low, high, total, stage


@gluon.jit
def _pass(memory, mine, next_group, steps, count, turn):
    """The turns of :func:`_attend` for a group without queries, which must not block the others."""
    _, _, _, _, k_ready, k_free, v_ready, v_free = memory
    STAGES: gl.constexpr = k_ready.shape[0]
    for step in range(steps):
        stage = (count + step) % STAGES
        phase = (count + step) // STAGES & 1
        mbarrier.wait(k_ready.index(stage), phase)
        mbarrier.arrive(k_free.index(stage))
        mbarrier.wait(mine, (turn + step) & 1)
        mbarrier.arrive(next_group)
        mbarrier.wait(v_ready.index(stage), phase)
        mbarrier.arrive(v_free.index(stage))
    mbarrier.wait(mine, (turn + steps) & 1)
    mbarrier.arrive(next_group)


@gluon.jit
def _consume(barriers, buffers, results, grid, K: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Four warps with 64 queries of each tile. Groups take turns on the tensor cores, in a ring."""
    out, out_stride, scale = results
    _, keys, _, tiles = grid
    turns, q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    ql, qh, kl, kh, vl, vh = buffers
    memory = (kl, kh, vl, vh, k_ready, k_free, v_ready, v_free)
    mine = turns.index(GROUP)
    next_group = turns.index((GROUP + 1) % GROUPS)
    ROWS: gl.constexpr = _QUERIES * GROUPS
    crop, first, head, row, row_end = _find(gl.program_id(0), gl.to_tensor(0), gl.to_tensor(0), grid, ROWS)
    length = gl.load(keys + crop + 1) - gl.load(keys + crop)
    done = 0
    count = 0
    turn = 0
    if GROUP == 0:
        turn = 1  # waiting for the phase before the first one succeeds at once
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        half = done % 2
        mbarrier.wait(q_ready.index(half), done // 2 & 1)
        steps = gl.cdiv(length, kl.shape[1])
        if row + GROUP * _QUERIES < row_end:
            q_low = ql.index(half * GROUPS + GROUP).reshape([_QUERIES, _LOW])
            q_high = qh.index(half * GROUPS + GROUP).reshape([_QUERIES, _HIGH])
            low, high, total, stage = _attend(q_low, q_high, memory, mine, next_group, length, count, turn, scale)
            at = out + head * K
            from_row = row + GROUP * _QUERIES
            to_row = row_end
            # The next tile is looked up while the tensor cores work on this one.
            crop, first, head, row, row_end = _find(tile + gl.num_programs(0), crop, first, grid, ROWS)
            length = gl.load(keys + crop + 1) - gl.load(keys + crop)
            low, high = warpgroup_mma_wait(0, deps=(low, high))
            mbarrier.arrive(v_free.index(stage))
            _store(at, out_stride, _scale_rows(low, 1.0 / total), from_row, to_row, 0, K)
            _store(at, out_stride, _scale_rows(high, 1.0 / total), from_row, to_row, _LOW, K)
        else:
            _pass(memory, mine, next_group, steps, count, turn)
            crop, first, head, row, row_end = _find(tile + gl.num_programs(0), crop, first, grid, ROWS)
            length = gl.load(keys + crop + 1) - gl.load(keys + crop)
        mbarrier.arrive(q_free.index(half))
        done += 1  # noqa: SIM113
        count += steps
        turn += steps + 1


@gluon.jit
def _barriers(many: gl.constexpr, count: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [many, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(many):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit
def _tiles(descriptor, many: gl.constexpr):
    shape: gl.constexpr = [many] + descriptor.block_type.shape  # noqa: RUF005, which Gluon cannot read
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit(do_not_specialize=["tiles"])
def _attention_kernel(
    q_low, q_high, k_low, k_high, v_low, v_high, out, out_stride, queries, keys, heads, tiles, scale,
    K: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per multiprocessor; program n takes tiles n, n + grid, n + 2 grid and so on."""
    inputs = (q_low, q_high, k_low, k_high, v_low, v_high)
    buffers = (
        _tiles(q_low, 2 * GROUPS), _tiles(q_high, 2 * GROUPS), _tiles(k_low, STAGES), _tiles(k_high, STAGES),
        _tiles(v_low, STAGES), _tiles(v_high, STAGES),
    )  # fmt: skip
    barriers = (
        _barriers(GROUPS, 1), _barriers(2, 1), _barriers(2, GROUPS), _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
        _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
    )  # fmt: skip
    grid = (queries, keys, heads, tiles)
    results = (out, out_stride, scale)
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_consume, (barriers, buffers, results, grid, K, GROUPS, 0)),
                (_consume, (barriers, buffers, results, grid, K, GROUPS, 1)),
                (_consume, (barriers, buffers, results, grid, K, GROUPS, 2)),
                (_produce, (inputs, barriers, buffers, grid, GROUPS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (barriers, buffers, results, grid, K, GROUPS, 0)),
                (_consume, (barriers, buffers, results, grid, K, GROUPS, 1)),
                (_produce, (inputs, barriers, buffers, grid, GROUPS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


@cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a Hopper GPU; 0 for any other."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


def fits(q_PHK: Tensor, k_PHK: Tensor, v_PHK: Tensor, *_: object, causal: bool) -> bool:
    """Whether the kernel takes these: 16 bits on Hopper, heads alike on both sides, 16-byte steps in memory."""
    return (
        not causal
        and q_PHK.shape[-1] in _WIDTHS
        and q_PHK.shape[1:] == k_PHK.shape[1:]
        and q_PHK.dtype in (torch.bfloat16, torch.float16)
        and all(_aligned(x) for x in (q_PHK, k_PHK, v_PHK))
        and _multiprocessors(q_PHK.device) > 0
    )


def _aligned(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0


@operations.attention.register(Where.INFERENCE, fits=fits)
def attention_vision(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, *, causal: bool
) -> Tensor:
    """Every query of a crop attends to all keys of that crop."""
    assert not causal, "the kernel has no causal mask"
    assert len(queries.lengths) == len(keys.lengths), "queries and keys have different numbers of segments"
    T, H, K = q_THK.shape
    out = torch.empty(T, H, K, dtype=q_THK.dtype, device=q_THK.device)
    if T:
        grid, arguments, constants = _plan(q_THK, k_SHK, v_SHK, out, queries, keys, _multiprocessors(q_THK.device))
        _attention_kernel[grid](*arguments, **constants)
    return out


def _plan(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, queries: Segments, keys: Segments, multiprocessors: int
) -> tuple[tuple[int], tuple[Any, ...], dict[str, int]]:
    """Grid, arguments and constants of the launch."""
    H, K = q.shape[1:]
    groups, tiles = _split(queries.lengths, H, multiprocessors)
    inputs = (
        _descriptor(x, rows, width)
        for x, rows in ((q, _QUERIES.value), (k, _KEYS), (v, _KEYS))
        for width in (_LOW.value, _HIGH.value)
    )
    scale = K**-0.5 * 1.4426950408889634
    arguments = (*inputs, out, out.stride(0), queries.cu_seqlens, keys.cu_seqlens, H, tiles, scale)
    registers = {2: {"REGISTERS": 240, "maxnreg": 168}, 3: {"REGISTERS": 160, "maxnreg": 128}}[groups]
    constants = {"K": K, "GROUPS": groups, "STAGES": _STAGES, "num_warps": 4, **registers}
    return (min(multiprocessors, tiles),), arguments, constants


def _split(lengths: tuple[int, ...], heads: int, multiprocessors: int) -> tuple[int, int]:
    """Groups of 64 queries in a tile, and the tiles there are: what gives the least rounds of work.

    Three groups keep the tensor cores busier than two, at the same work; smaller tiles fill the last round better.
    """
    tiles = {groups: heads * sum(triton.cdiv(n, groups * _QUERIES.value) for n in lengths) for groups in _SPEED}
    groups = min(_SPEED, key=lambda groups: triton.cdiv(tiles[groups], multiprocessors) * groups / _SPEED[groups])
    return groups, tiles[groups]


def _descriptor(x: Tensor, rows: int, width: int) -> Any:
    layout = _LOW_LAYOUT if width == _LOW.value else _HIGH_LAYOUT
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, width], layout)
