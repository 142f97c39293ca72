"""LoRA with gradients: products with ``a`` (shrink) and ``b`` (expand) that read their wide side once.

Rows are sorted by expert; a linear layer is one expert. A tile is some rows of one expert. Dropout is a hash of seed,
row and column, so that no mask is stored and the backward pass draws the same one.

P rows, T tokens, E experts, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels.shared_memory import Loop, first_within
from aria.ops.lora import LoRA
from aria.ops.registry import Where

ROWS = 32
"""Rows of a tile: few, so that 8,192 tokens of a linear layer give each multiprocessor two programs."""


@triton.jit
def tile_of(ends_ptr, tile, P, E: tl.constexpr, E_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of the rows of a tile; tiles past the last one have no rows."""
    if ends_ptr is None:
        expert, first, end = tile * 0, tile * ROWS, P
    else:
        e = tl.arange(0, E_BLOCK)
        ends = tl.load(ends_ptr + e, mask=e < E, other=0)
        starts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
        tiles = (ends - starts + ROWS - 1) // ROWS
        last = tl.cumsum(tiles, 0)
        expert = tl.sum((last <= tile).to(tl.int32), 0)
        here = e == expert
        first = tl.sum(tl.where(here, starts + (tile - last + tiles) * ROWS, 0), 0)
        end = tl.sum(tl.where(here, ends, 0), 0)
    return expert, first, end


@triton.jit
def kept(seed, row, column, threshold):
    """Elements that dropout keeps, ``(rows, columns)``: those whose 32-bit hash reaches the threshold."""
    line = _hash(row.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32))
    return _hash(line[:, None] + column.to(tl.uint32)[None, :] * 0x85EBCA77) >= threshold.to(tl.uint32)


@triton.jit
def _hash(x):
    """Three rounds of shifts and multiplications, which spread every input bit over every result bit."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["P", "seed", "threshold"])
def _shrink(
    x_ptr, source_ptr, ends_ptr, a_ptr, rows_ptr, h_ptr, P, seed, threshold, kept_scale, scaling,
    x_stride, h_stride, a_expert, a_in, a_rank,
    E: tl.constexpr, I: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr, STORE_DROPPED: tl.constexpr,
    E_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), P, E, E_BLOCK, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    i = tl.arange(0, I_BLOCK)
    r = tl.arange(0, R_BLOCK)
    source = row if source_ptr is None else tl.load(source_ptr + row, mask=row < end, other=0)
    x_row = x_ptr + source.to(tl.int64)[:, None] * x_stride
    out_row = row.to(tl.int64)[:, None]
    sums = tl.zeros((ROWS, R_BLOCK), tl.float32)
    for start in tl.range(0, I, I_BLOCK):
        column = start + i
        inside = (row < end)[:, None] & (column < I)[None, :]
        x = tl.load(x_row + column[None, :], mask=inside, other=0.0)
        whole = x
        if DROP:
            x = tl.where(kept(seed, row, column, threshold), x.to(tl.float32) * kept_scale, 0.0).to(x.dtype)
        if rows_ptr is not None:
            tl.store(rows_ptr + out_row * I + column[None, :], x if STORE_DROPPED else whole, mask=inside)
        if h_ptr is not None:
            near = (column < I)[:, None] & (r < R)[None, :]
            a_place = a_ptr + expert * a_expert + column[:, None] * a_in + r[None, :] * a_rank
            a = tl.load(a_place, mask=near, other=0.0).to(x.dtype)
            sums = tl.dot(x, a, sums, input_precision="ieee")
    if h_ptr is not None:
        h_place = h_ptr + out_row * h_stride + r[None, :]
        tl.store(h_place, sums * scaling, mask=(row < end)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["P", "seed", "threshold"])
def _expand(
    y_ptr, h_ptr, ends_ptr, b_ptr, P, seed, threshold, kept_scale, h_stride, b_expert, b_rank, b_out,
    E: tl.constexpr, O: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
    E_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), P, E, E_BLOCK, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * O_BLOCK + tl.arange(0, O_BLOCK)
    r = tl.arange(0, R_BLOCK)
    there = (row < end)[:, None]
    h = tl.load(h_ptr + row.to(tl.int64)[:, None] * h_stride + r[None, :], mask=there & (r < R)[None, :], other=0.0)
    b_place = b_ptr + expert * b_expert + r[:, None] * b_rank + column[None, :] * b_out
    b = tl.load(b_place, mask=(r < R)[:, None] & (column < O)[None, :], other=0.0).to(h.dtype)
    more = tl.dot(h, b, input_precision="ieee")
    if DROP:
        more = tl.where(kept(seed, row, column, threshold), more * kept_scale, 0.0)
    place = y_ptr + row.to(tl.int64)[:, None] * O + column[None, :]
    inside = there & (column < O)[None, :]
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, y + more, mask=inside)


class Noise:
    """The dropout mask of one product: a seed from PyTorch's CPU generator, which activation checkpointing restores."""

    def __init__(self, dropout: float):
        assert 0 <= dropout < 1, f"dropout is {dropout}"
        self.drop = dropout > 0
        self.seed = int(torch.randint(2**31 - 1, ())) if self.drop else 0
        # As a signed 32-bit number; the kernel reads the same bits as an unsigned one.
        threshold = int(dropout * 2**32)
        self.threshold = threshold - 2**32 if threshold >= 2**31 else threshold
        self.scale = 1 / (1 - dropout)

    @property
    def arguments(self) -> tuple[int, int, float]:
        return self.seed, self.threshold, self.scale


NONE = Noise(0.0)


def tiles(rows: int, ends: Tensor | None) -> int:
    """Maximum number of tiles of these rows."""
    return triton.cdiv(rows, ROWS) if ends is None else rows // ROWS + min(rows, len(ends))


def rank_block(rank: int) -> int:
    """Tile size for this many ranks: at least the tensor cores' 16."""
    return max(16, triton.next_power_of_2(rank))


def blocks(ends: Tensor | None, rank: int) -> dict[str, int]:
    """Compile-time sizes of the kernels of this file and of SwiGLU."""
    return _blocks(1 if ends is None else len(ends), rank)


@lru_cache(maxsize=64)
def _blocks(experts: int, rank: int) -> dict[str, int]:
    return {
        "E": experts, "R": rank, "E_BLOCK": triton.next_power_of_2(experts),
        "R_BLOCK": rank_block(rank), "ROWS": ROWS,
    }  # fmt: skip


_LOOPS = Loop(128, 3), Loop(128, 2), Loop(64, 2), Loop(32, 2), Loop(16, 2)


@lru_cache(maxsize=64)
def _shrinking(rank: int, size: int, adapter_size: int, device: torch.device) -> Loop | None:
    """The loop of :func:`_shrink` for these element sizes; None if the rank does not fit into shared memory."""
    wide = rank_block(rank)

    def needs(loop: Loop) -> int:
        return loop.block * ((ROWS * size + wide * adapter_size) * (loop.stages - 1) + ROWS * size)

    return first_within(_LOOPS, needs, device)


@lru_cache(maxsize=64)
def _expanding(rank: int, size: int, adapter_size: int, device: torch.device) -> int | None:
    """Columns of a program of :func:`_expand`; None if the rank does not fit into shared memory."""
    wide = rank_block(rank)

    def needs(loop: Loop) -> int:
        return wide * (loop.block * adapter_size + ROWS * size)

    loop = first_within([Loop(block, 1) for block in (128, 64, 32, 16)], needs, device)
    return None if loop is None else loop.block


def fits(rank: int, size: int, adapter_size: int, device: torch.device) -> bool:
    """Whether a rank fits into shared memory, for these element sizes."""
    sizes = rank, size, adapter_size, device
    return _shrinking(*sizes) is not None and _expanding(*sizes) is not None


def fits_linears(x: Tensor, _: object, loras: Sequence[LoRA]) -> bool:
    """Whether these kernels take linear layers of one input: read together, their ranks add up."""
    rank, size = sum(len(lora.a) for lora in loras), max(lora.a.element_size() for lora in loras)
    return x.ndim == 2 and fits(rank, x.element_size(), size, x.device)


def _fits_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, lora: LoRA) -> bool:
    return fits_linears(x_TI, None, [lora])


def gather(
    x: Tensor,
    a_EIR: Tensor | None = None,
    scaling: float = 1.0,
    noise: Noise = NONE,
    *,
    ends: Tensor | None = None,
    source: Tensor | None = None,
    dropped: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rows in the order of their experts, and their products with ``a`` in the same pass.

    Args:
        x: ``(N, I)``, rows contiguous.
        a_EIR, scaling, noise: See :func:`shrink`; None: rows only.
        ends: int32 ``(E,)``: where the rows of each expert end. None: there is one expert.
        source: int32 ``(P,)``: the row of ``x`` that each row copies. None: in order.
        dropped: Whether dropout is applied to the returned rows.

    Returns:
        ``(P, I)`` and ``(P, R)`` or None; in the dtype of ``x``.
    """
    rows = x.new_empty(len(x if source is None else source), x.shape[1])
    h = None if a_EIR is None else x.new_empty(len(rows), a_EIR.shape[2])
    _launch(x, a_EIR, scaling, noise, ends, source, rows, dropped, h)
    return rows, h


def shrink(
    x: Tensor, a_EIR: Tensor, scaling: float = 1.0, noise: Noise = NONE, *, ends: Tensor | None = None
) -> Tensor:
    """``scaling * dropout(x) @ a`` of each row's expert, ``(P, R)``.

    Args:
        x: ``(P, I)``, rows contiguous.
        a_EIR: ``(E, I, R)`` in any order in memory and any dtype; it is multiplied in that of ``x``.
        ends: See :func:`gather`.
    """
    h = x.new_empty(len(x), a_EIR.shape[2])
    _launch(x, a_EIR, scaling, noise, ends, None, None, False, h)
    return h


def _launch(
    x: Tensor,
    a: Tensor | None,
    scaling: float,
    noise: Noise,
    ends: Tensor | None,
    source: Tensor | None,
    rows: Tensor | None,
    dropped: bool,
    h: Tensor | None,
) -> None:
    P, width = len(x if source is None else source), x.shape[1]
    assert not P or x.stride(1) == 1, "rows must be contiguous"
    strides = (0,) * 4 if a is None or h is None else (h.stride(0), *a.stride())
    rank, size = (1, 0) if a is None else (a.shape[2], a.element_size())
    loop = _shrinking(rank, x.element_size(), size, x.device)
    assert loop is not None, f"rank {rank} does not fit into shared memory"
    if P:
        _shrink[(tiles(P, ends),)](
            x, source, ends, a, rows, h, P, *noise.arguments, scaling, x.stride(0), *strides,
            I=width, DROP=noise.drop, STORE_DROPPED=dropped, I_BLOCK=loop.block, num_warps=4, num_stages=loop.stages,
            **blocks(ends, rank),
        )  # fmt: skip


def expand(y: Tensor, h: Tensor, b_ERO: Tensor, noise: Noise = NONE, *, ends: Tensor | None = None) -> Tensor:
    """``y + dropout(h @ b)`` in place; dropout is for gradients, with the mask of the forward product.

    Args:
        y: ``(P, O)`` contiguous.
        h: ``(P, R)``, rows contiguous.
        b_ERO: ``(E, R, O)`` in any order in memory and any dtype; it is multiplied in that of ``h``.
        ends: See :func:`shrink`.
    """
    P, width = y.shape
    assert y.is_contiguous() and h.stride(1) == 1, "rows must be contiguous"
    block = _expanding(h.shape[1], h.element_size(), b_ERO.element_size(), y.device)
    assert block is not None, f"rank {h.shape[1]} does not fit into shared memory"
    if P:
        _expand[tiles(P, ends), triton.cdiv(width, block)](
            y, h, ends, b_ERO, P, *noise.arguments, h.stride(0), *b_ERO.stride(),
            O=width, DROP=noise.drop, O_BLOCK=block, num_warps=4, **blocks(ends, h.shape[1]),
        )  # fmt: skip
    return y


class _LoRALinears(torch.autograd.Function):
    """Linear layers of one input with LoRA weights. Saves ``x`` and the products with ``a``, one tensor for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, dropout: float, *matrices: Tensor | None) -> tuple[Tensor, ...]:
        noise = Noise(dropout)
        layers = _layers(matrices)
        a_RI = _stacked(layers)
        h = shrink(x, a_RI.t()[None], scaling, noise)
        ctx.save_for_backward(x, h, *matrices)
        ctx.noise, ctx.scaling = noise, scaling
        pieces = zip(layers, _split(h, layers), strict=True)
        return tuple(expand(F.linear(x, layer.weight, layer.bias), part, layer.b.t()[None]) for layer, part in pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *matrices = ctx.saved_tensors
        layers = _layers(matrices)
        needs_x, _, _, *needs = ctx.needs_input_grad
        a_RI, dh = _stacked(layers), torch.empty_like(h)
        dx: Tensor | None = None
        found: list[Tensor | None] = []
        for n, (layer, dy) in enumerate(zip(layers, grads, strict=True)):
            dy = dy if dy.stride(1) == 1 else dy.contiguous()
            _launch(dy, layer.b[None], ctx.scaling, NONE, None, None, None, False, _split(dh, layers)[n])
            if needs_x:
                dx = dy @ layer.weight if dx is None else dx.addmm_(dy, layer.weight)
            of_weight, of_bias, _, of_b = needs[4 * n : 4 * n + 4]
            found += [
                dy.t() @ x if of_weight else None,
                dy.sum(0) if of_bias else None,
                None,
                _thin(dy, _split(h, layers)[n], layer.b.dtype) if of_b else None,
            ]
        if any(needs[2::4]):
            dropped = gather(x, noise=ctx.noise, dropped=True)[0] if ctx.noise.drop else x
            da_RI = _thin(dh, dropped, a_RI.dtype)
            found[2::4] = da_RI.split([len(layer.a) for layer in layers])
        if dx is not None:
            expand(dx, dh, a_RI[None], ctx.noise)
        return dx, None, None, *found


class Layer(NamedTuple):
    """A linear layer with LoRA weights."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor


def _layers(matrices: Sequence[Any]) -> list[Layer]:
    return [Layer(*matrices[i : i + 4]) for i in range(0, len(matrices), 4)]


def _stacked(layers: Sequence[Layer]) -> Tensor:
    """All ``a``, concatenated: ``(sum of R, I)``."""
    return layers[0].a if len(layers) == 1 else torch.cat([layer.a for layer in layers])


def _split(h: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    return h.split([len(layer.a) for layer in layers], dim=1)


def _thin(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``x^T y`` in ``dtype``: gradients of float32 LoRA weights are not rounded."""
    if x.is_cuda and dtype == torch.float32 and x.dtype != dtype:
        return torch.mm(x.t(), y, out_dtype=dtype)
    return (x.t() @ y).to(dtype)


@operations.lora_linears.register(Where.TRAINING, fits=fits_linears)
def lora_linears_train(
    x_TI: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], loras: Sequence[LoRA]
) -> tuple[Tensor, ...]:
    """With gradients; layers of one scaling, dropout and dtype share one pass over the input."""
    if len({(lora.scaling, lora.dropout, lora.a.dtype) for lora in loras}) > 1:
        pairs = zip(layers, loras, strict=True)
        return tuple(lora_linears_train(x_TI, [layer], [lora])[0] for layer, lora in pairs)
    matrices = [
        matrix for layer, lora in zip(layers, loras, strict=True) for matrix in Layer(*layer, lora.a, lora.b)
    ]  # fmt: skip
    return _LoRALinears.apply(x_TI, loras[0].scaling, loras[0].dropout, *matrices)


@operations.lora_linear.register(Where.TRAINING, fits=_fits_linear)
def lora_linear_train(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, lora: LoRA) -> Tensor:
    """With gradients."""
    return lora_linears_train(x_TI, [(weight_OI, bias_O)], [lora])[0]
