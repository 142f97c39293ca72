"""SwiGLU with gradients, with the LoRA weights of the products before and after it, in one pass each way.

The product before is never written a second time: its adapter's part is added where it is read. The pass back also
gives what SwiGLU's result was, for the gradients of the weights behind it, so that nobody keeps it.

P rows, E experts, F expert width, R rank; tiles as in :mod:`aria.ops.kernels.lora_train`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels.lora_train import NONE, ROWS, Noise, blocks, kept, rank_block, tile_of, tiles
from aria.ops.kernels.shared_memory import Loop, first_within
from aria.ops.registry import Where


@triton.jit
def _read(x_ptr, h, wide_ptr, column, F, O, inside, r, R):
    """A block of a product plus its LoRA term, float32."""
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    if wide_ptr is not None:
        wide = tl.load(wide_ptr + r[:, None] * O + column[None, :], mask=(r < R)[:, None] & F[None, :], other=0.0)
        x += tl.dot(h, wide.to(h.dtype), input_precision="ieee")
    return x


@triton.jit(do_not_specialize=["P", "seed", "threshold"])
def _forward(
    gate_ptr, up_ptr, stride, h_ptr, b_ptr, ends_ptr, a_ptr, out_ptr, thin_ptr,
    P, seed, threshold, kept_scale, scaling,
    F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
    E_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), P, E, E_BLOCK, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    f, r = tl.arange(0, F_BLOCK), tl.arange(0, R_BLOCK)
    there = (row < end)[:, None]
    thin = there & (r < R)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    h = tl.zeros((ROWS, R_BLOCK), tl.float32)
    if h_ptr is not None:
        h = tl.load(h_ptr + wide_row * R + r[None, :], mask=thin, other=0.0)
    b = b_ptr
    if b_ptr is not None:
        b = b_ptr + expert * (2 * F * R)
    sums = tl.zeros((ROWS, R_BLOCK), tl.float32)
    for start in tl.range(0, F, F_BLOCK):
        column = start + f
        inside = there & (column < F)[None, :]
        at = wide_row * stride + column[None, :]
        gate = _read(gate_ptr + at, h, b, column, column < F, 2 * F, inside, r, R)
        up = _read(up_ptr + at, h, b, F + column, column < F, 2 * F, inside, r, R)
        out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + wide_row * F + column[None, :], out, mask=inside)
        if a_ptr is not None:
            if DROP:
                left = tl.where(kept(seed, row, column, threshold), out.to(tl.float32) * kept_scale, 0.0)
                out = left.to(out.dtype)
            near = (column < F)[:, None] & (r < R)[None, :]
            a = tl.load(a_ptr + (expert * F + column[:, None]) * R + r[None, :], mask=near, other=0.0)
            sums = tl.dot(out, a.to(out.dtype), sums, input_precision="ieee")
    if a_ptr is not None:
        tl.store(thin_ptr + wide_row * R + r[None, :], sums * scaling, mask=thin)


@triton.jit(do_not_specialize=["P", "seed", "threshold"])
def _backward(
    gate_ptr, up_ptr, stride, h_ptr, b_ptr, ends_ptr, a_ptr, grad_ptr, grad_thin_ptr, weights_ptr,
    dgate_ptr, dup_ptr, dstride, dthin_ptr, dweights_ptr, out_ptr, dropped_ptr,
    P, seed, threshold, kept_scale, scaling,
    F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
    E_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), P, E, E_BLOCK, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    f, r = tl.arange(0, F_BLOCK), tl.arange(0, R_BLOCK)
    there = (row < end)[:, None]
    thin = there & (r < R)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    dtype = grad_ptr.dtype.element_ty
    h = tl.zeros((ROWS, R_BLOCK), tl.float32)
    b = b_ptr
    if h_ptr is not None:
        h = tl.load(h_ptr + wide_row * R + r[None, :], mask=thin, other=0.0)
        b = b_ptr + expert * (2 * F * R)
    grad_thin = tl.zeros((ROWS, R_BLOCK), tl.float32)
    if grad_thin_ptr is not None:
        grad_thin = tl.load(grad_thin_ptr + wide_row * R + r[None, :], mask=thin, other=0.0)
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, R_BLOCK), tl.float32)
    for start in tl.range(0, F, F_BLOCK):
        column = start + f
        inside = there & (column < F)[None, :]
        at = wide_row * stride + column[None, :]
        gate = _read(gate_ptr + at, h, b, column, column < F, 2 * F, inside, r, R)
        up = _read(up_ptr + at, h, b, F + column, column < F, 2 * F, inside, r, R)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        out = silu * up
        near = (column < F)[:, None] & (r < R)[None, :]
        keep = inside
        if DROP:
            keep = kept(seed, row, column, threshold)
        grad = tl.load(grad_ptr + wide_row * F + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if grad_thin_ptr is not None:
            a = tl.load(a_ptr + (expert * F + column[:, None]) * R + r[None, :], mask=near, other=0.0)
            more = tl.dot(grad_thin, tl.trans(a.to(grad_thin.dtype)), input_precision="ieee")
            if DROP:
                more = tl.where(keep, more * kept_scale, 0.0)
            grad += more
        # Each row's output is linear in SwiGLU's result: this is also its product with the output's gradient.
        dweight += tl.sum(grad * out, 1)
        if out_ptr is not None:
            tl.store(out_ptr + wide_row * F + column[None, :], out * weight[:, None], mask=inside)
        if dropped_ptr is not None:
            left = out * weight[:, None]
            if DROP:
                left = tl.where(keep, left * kept_scale, 0.0)
            tl.store(dropped_ptr + wide_row * F + column[None, :], left, mask=inside)
        grad *= weight[:, None]
        dgate = (grad * up * (sigmoid + silu * (1 - sigmoid))).to(dtype)
        dup = (grad * silu).to(dtype)
        dat = wide_row * dstride + column[None, :]
        tl.store(dgate_ptr + dat, dgate, mask=inside)
        tl.store(dup_ptr + dat, dup, mask=inside)
        if dthin_ptr is not None:
            b_place = b + r[None, :] * (2 * F) + column[:, None]
            b_gate = tl.load(b_place, mask=near, other=0.0).to(dtype)
            b_up = tl.load(b_place + F, mask=near, other=0.0).to(dtype)
            sums = tl.dot(dgate, b_gate, sums, input_precision="ieee")
            sums = tl.dot(dup, b_up, sums, input_precision="ieee")
    if dweights_ptr is not None:
        tl.store(dweights_ptr + row, dweight, mask=row < end)
    if dthin_ptr is not None:
        tl.store(dthin_ptr + wide_row * R + r[None, :], sums * scaling, mask=thin)


class Sides(NamedTuple):
    """LoRA weights of the products before and after SwiGLU, of the same rank, or None."""

    thin: Tensor | None
    """``(P, R)``: the product with ``a`` before SwiGLU, scaling included."""
    wide: Tensor | None
    """``(E, R, 2F)`` contiguous: ``b`` of the product before."""
    narrow: Tensor | None
    """``(E, F, R)`` contiguous: ``a`` of the product after."""
    scaling: tuple[float, float]
    """Of the product before and of the product after."""
    noise: Noise
    """Dropout of the product after."""

    @property
    def rank(self) -> int:
        found = [x.shape[n] for x, n in ((self.wide, 1), (self.narrow, 2)) if x is not None]
        assert len(set(found)) < 2, f"LoRA weights of different ranks: {found}"
        return found[0] if found else 1


PLAIN = Sides(None, None, None, (1.0, 1.0), NONE)
_LOOPS = Loop(64, 3), Loop(64, 2), Loop(32, 2), Loop(16, 2), Loop(16, 1)


@lru_cache(maxsize=64)
def loop_of(rank: int, size: int, adapter_size: int, device: torch.device, backward: bool) -> Loop | None:
    """The loop for these element sizes; None if the rank does not fit into shared memory."""
    wide = rank_block(rank)
    # Tiles over the rank: one or two of rows, and of columns of LoRA weights three forward and five backward.
    thin, columns, rows = (2, 5, 2) if backward else (1, 3, 1)

    def needs(loop: Loop) -> int:
        ahead = loop.stages - 1
        read = columns * ahead if ahead else thin
        beside = rows * ROWS * size * (1 + ahead * backward)
        return thin * ROWS * wide * size + loop.block * (read * wide * adapter_size + beside)

    return first_within(_LOOPS, needs, device)


def _options(gate: Tensor, sides: Sides, *, backward: bool) -> dict[str, int]:
    """Options of a launch."""
    size = max((x.element_size() for x in (sides.wide, sides.narrow) if x is not None), default=0)
    loop = loop_of(sides.rank, gate.element_size(), size, gate.device, backward)
    assert loop is not None, f"rank {sides.rank} does not fit into shared memory"
    return {"F_BLOCK": loop.block, "num_stages": loop.stages, "num_warps": 4}


def forward(gate_PF: Tensor, up_PF: Tensor, sides: Sides = PLAIN, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up``, and its product with ``a``.

    Args:
        gate_PF, up_PF: Products without their LoRA term, with equal strides.
        sides: LoRA weights before and after.
        ends: int32 ``(E,)``: where the rows of each expert end. None: there is one expert.

    Returns:
        ``(P, F)`` and ``(P, R)``; the second is empty if the product after has no LoRA weights.
    """
    P, width = gate_PF.shape
    _check(gate_PF, up_PF)
    out = gate_PF.new_empty(P, width)
    thin = gate_PF.new_empty(0 if sides.narrow is None else P, sides.rank)
    if P:
        _forward[(tiles(P, ends),)](
            gate_PF, up_PF, gate_PF.stride(0), sides.thin, sides.wide, ends, sides.narrow, out, thin,
            P, *sides.noise.arguments, sides.scaling[1], F=width, DROP=sides.noise.drop,
            **_options(gate_PF, sides, backward=False), **blocks(ends, sides.rank),
        )  # fmt: skip
    return out, thin


class Gradients(NamedTuple):
    """Results of :func:`backward`; None for those that were not requested."""

    gate_up: Tensor
    """``(P, 2F)``: gradient of gate and up."""
    thin: Tensor | None
    """``(P, R)``: gradient of the product with ``a`` before."""
    weights: Tensor | None
    """float32 ``(P,)``: gradient of the routing weights."""
    out: Tensor | None
    """``(P, F)``: SwiGLU's result times the routing weights."""
    dropped: Tensor | None
    """The same after dropout."""


def backward(
    gate_PF: Tensor,
    up_PF: Tensor,
    grad_PF: Tensor,
    sides: Sides = PLAIN,
    ends: Tensor | None = None,
    *,
    grad_thin_PR: Tensor | None = None,
    weights_P: Tensor | None = None,
    out: bool = False,
    dropped: bool = False,
) -> Gradients:
    """Gradients of :func:`forward`, and its results, recomputed.

    Args:
        gate_PF, up_PF, sides, ends: See :func:`forward`.
        grad_PF: Gradient of the result, without the part through the LoRA term after, before routing weights.
        grad_thin_PR: Gradient of the product with ``a`` after, scaling included, before routing weights.
        weights_P: Routing weights of the rows; None: 1.
        out, dropped: Whether to return the result, before or after dropout.
    """
    P, width = gate_PF.shape
    _check(gate_PF, up_PF)
    assert grad_PF.is_contiguous(), "rows must be contiguous"
    empty = gate_PF.new_empty
    gate_up = empty(P, 2 * width)
    found = Gradients(
        gate_up,
        empty(P, sides.rank) if sides.thin is not None else None,
        empty(P, dtype=torch.float32) if weights_P is not None else None,
        empty(P, width) if out else None,
        empty(P, width) if dropped else None,
    )
    if P:
        _backward[(tiles(P, ends),)](
            gate_PF, up_PF, gate_PF.stride(0), sides.thin, sides.wide, ends, sides.narrow,
            grad_PF, grad_thin_PR, weights_P, gate_up, gate_up[:, width:], 2 * width, *found[1:],
            P, *sides.noise.arguments, sides.scaling[0], F=width, DROP=sides.noise.drop,
            **_options(gate_PF, sides, backward=True), **blocks(ends, sides.rank),
        )  # fmt: skip
    return found


def _check(gate_PF: Tensor, up_PF: Tensor) -> None:
    assert gate_PF.stride() == up_PF.stride() and gate_PF.stride(1) == 1, (
        "gate and up must have equal strides and contiguous rows"
    )


class _Gated(torch.autograd.Function):
    """``silu(gate) * up``; saves only these two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return forward(gate, up)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = backward(gate, up, grads[0].contiguous()).gate_up.chunk(2, dim=1)
        return dgate, dup


@operations.gated.register(Where.TRAINING)
def gated_train(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """One pass each way."""
    return _Gated.apply(gate_TF, up_TF)
