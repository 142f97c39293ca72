"""LoRA products of a decode step with several adapters: few tokens, each with the ranks of its own adapter.

The product with ``a`` (shrink) has too few outputs to fill the GPU, so its sum over the inputs is split among SPLIT
programs; the kernel that reads the result adds the parts in order and multiplies with ``b`` (expand).

T tokens, E experts, A experts of a token, R ranks of all adapters together, I inputs; rows are as in
:mod:`~aria.ops.kernels.moe_decode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels.pdl import overlap, release, wait
from aria.ops.kernels.shared_memory import stages_within
from aria.ops.multi_lora import MultiLoRA
from aria.ops.registry import Where

SPLIT = 4
MOST_RANKS = 128
"""Ranks of all adapters that a program of these products can hold."""
MOST_TOKENS = 64
"""Tokens up to which these kernels are faster beside a linear layer (docs/lab/kernels.md)."""


@triton.jit
def _part(
    x_ptrs, a_ptrs, stride, live, first, I: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr, R_BLOCK: tl.constexpr, LENGTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products over at most LENGTH inputs from ``first`` on: ``(BLOCK_T, R_BLOCK)``. Inputs in ``a`` are ``stride``
    apart."""
    sums = tl.zeros((BLOCK_T, R_BLOCK), tl.float32)
    r = tl.arange(0, R_BLOCK)
    for step in tl.range(0, LENGTH, BLOCK_I, num_stages=STAGES):
        i = first + step + tl.arange(0, BLOCK_I)
        x = tl.load(x_ptrs[:, None] + i[None, :], mask=live[:, None] & (i < I)[None, :], other=0.0)
        a = tl.load(a_ptrs[None, :] + i[:, None] * stride, mask=(i < I)[:, None] & (r < R)[None, :], other=0.0)
        sums = tl.dot(x, a, sums, input_precision="ieee")
    return sums


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, rank_ids_ptr, h_ptr, shared_x_ptr, shared_a_ptr, shared_rank_ids_ptr, shared_h_ptr,
    ids_ptr, rows_ptr, counts_ptr, busy_ptr, T,
    E: tl.constexpr, A: tl.constexpr, I: tl.constexpr, R: tl.constexpr, SHARED_I: tl.constexpr, SHARED_R: tl.constexpr,
    BY_ROW: tl.constexpr, EVERY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, R_BLOCK: tl.constexpr,
    SHARED_BLOCK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The shared experts' tiles of tokens are first in the grid, then the experts that have tokens.

    ``h`` is ``(PARTS, T * A, R)`` and ``shared_h`` ``(PARTS, T, SHARED_R)``. With BY_ROW, ``x`` has a row for each pair
    of a token and an expert, else for each token. Ranks of other adapters are set to 0, whatever their values.
    """
    wait(PDL)
    tiles = tl.cdiv(T, BLOCK_T) if SHARED_R > 0 else 0
    program, part = tl.program_id(0), tl.program_id(1)
    if SHARED_R > 0 and program < tiles:
        _of_shared(
            shared_x_ptr, shared_a_ptr, shared_rank_ids_ptr, shared_h_ptr + part * T * SHARED_R, ids_ptr, T, program,
            part, SHARED_I, SHARED_R, BLOCK_T, BLOCK_I, SHARED_BLOCK, PARTS, STAGES,
        )  # fmt: skip
    if R > 0 and program >= tiles:
        _of_expert(
            x_ptr, a_ptr, rank_ids_ptr, h_ptr + part * T * A * R, ids_ptr, rows_ptr, counts_ptr, busy_ptr, T,
            program - tiles, part, E, A, I, R, BY_ROW, EVERY, BLOCK_T, BLOCK_I, R_BLOCK, PARTS, STAGES,
        )  # fmt: skip
    release(PDL)


@triton.jit
def _of_shared(
    x_ptr, a_ptr, rank_ids_ptr, h_ptr, ids_ptr, T, tile, part, I: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, R_BLOCK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = ((I + BLOCK_I - 1) // BLOCK_I + PARTS - 1) // PARTS * BLOCK_I
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < T
    a_ptrs = a_ptr + tl.arange(0, R_BLOCK) * I
    x_ptrs = x_ptr + tl.minimum(token, T - 1) * I
    sums = _part(x_ptrs, a_ptrs, 1, live, part * LENGTH, I, R, BLOCK_T, BLOCK_I, R_BLOCK, LENGTH, STAGES)
    _store(sums, h_ptr, token, token, live, rank_ids_ptr, ids_ptr, R, R_BLOCK)


@triton.jit
def _of_expert(
    x_ptr, a_ptr, rank_ids_ptr, h_ptr, ids_ptr, rows_ptr, counts_ptr, busy_ptr, T, slot, part,
    E: tl.constexpr, A: tl.constexpr, I: tl.constexpr, R: tl.constexpr, BY_ROW: tl.constexpr, EVERY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, R_BLOCK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = ((I + BLOCK_I - 1) // BLOCK_I + PARTS - 1) // PARTS * BLOCK_I
    if EVERY or slot < tl.load(busy_ptr + E):
        expert = slot
        if not EVERY:
            expert = tl.load(busy_ptr + slot)
        count = tl.load(counts_ptr + expert)
        a_ptrs = a_ptr + expert * (I * R) + tl.arange(0, R_BLOCK)
        start = 0
        while start < count:
            place = start + tl.arange(0, BLOCK_T)
            live = place < count
            row = tl.load(rows_ptr + expert * T + place, mask=live, other=0)
            token = row // A
            x_ptrs = x_ptr + (row if BY_ROW else token) * I
            sums = _part(x_ptrs, a_ptrs, R, live, part * LENGTH, I, R, BLOCK_T, BLOCK_I, R_BLOCK, LENGTH, STAGES)
            _store(sums, h_ptr, row, token, live, rank_ids_ptr, ids_ptr, R, R_BLOCK)
            start += BLOCK_T


@triton.jit
def _store(sums, h_ptr, row, token, live, rank_ids_ptr, ids_ptr, R: tl.constexpr, R_BLOCK: tl.constexpr):
    r = tl.arange(0, R_BLOCK)
    mine = tl.load(ids_ptr + token, mask=live, other=0)
    theirs = tl.load(rank_ids_ptr + r, mask=r < R, other=-1)
    kept = tl.where(mine[:, None] == theirs[None, :], sums, 0.0)
    tl.store(h_ptr + row[:, None] * R + r[None, :], kept, mask=live[:, None] & (r < R)[None, :])


@triton.jit
def expand(
    product, b_ptrs, stride, h_ptr, row, live, rows, R: tl.constexpr, R_BLOCK: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """``product + b h`` of some rows of ``h``: ``(outputs, len(row))``.

    Args:
        b_ptrs: Rank 0 of each output; ranks are ``stride`` apart.
        rows: Rows of ``h`` in each of its PARTS.
    """
    r = tl.arange(0, R_BLOCK)
    b = tl.load(b_ptrs[:, None] + r[None, :] * stride, mask=(r < R)[None, :], other=0.0)
    h_ptrs = h_ptr + row[:, None] * R + r[None, :]
    inside = live[:, None] & (r < R)[None, :]
    h = tl.load(h_ptrs, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        h += tl.load(h_ptrs + part * rows * R, mask=inside, other=0.0)
    return tl.dot(b, tl.trans(h.to(b.dtype)), product, input_precision="ieee")


# A slice of a step's adapter ids may start anywhere.
@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])
def _linear_kernel(
    x_ptr, a_ptr, rank_ids_ptr, h_ptr, ids_ptr, T, I: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr, R_BLOCK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products with ``a`` beside a linear layer of all tokens: ``h`` is ``(PARTS, T, R)``."""
    wait(PDL)
    part = tl.program_id(1)
    _of_shared(
        x_ptr, a_ptr, rank_ids_ptr, h_ptr + part * T * R, ids_ptr, T, tl.program_id(0), part, I, R, BLOCK_T,
        BLOCK_I, R_BLOCK, PARTS, STAGES,
    )  # fmt: skip
    release(PDL)


@triton.jit
def _add_kernel(
    y_ptr, h_ptr, b_ptr, out_ptr, T, O: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    R_BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``y + h b`` of a tile of tokens and outputs."""
    wait(PDL)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    live = token < T
    inside = (out < O)[:, None] & live[None, :]
    at = token.to(tl.int64)[None, :] * O + out[:, None]
    product = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b_ptrs = b_ptr + tl.minimum(out, O - 1) * R
    product = expand(product, b_ptrs, 1, h_ptr, token, live, T, R, R_BLOCK, PARTS)
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=inside)
    release(PDL)


class Shrunk(NamedTuple):
    """Products with ``a``, and ``b``, for routed and shared experts; None where there are no LoRA weights."""

    h: Tensor | None
    b: Tensor | None
    shared_h: Tensor | None
    shared_b: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """Arguments of the kernels that expand it."""
        R = 0 if self.h is None else self.h.shape[2]
        SHARED_R = 0 if self.shared_h is None else self.shared_h.shape[2]
        return {
            "h_ptr": self.h, "b_ptr": self.b, "shared_h_ptr": self.shared_h, "shared_b_ptr": self.shared_b,
            "R": R, "SHARED_R": SHARED_R, "R_BLOCK": _block(R), "SHARED_BLOCK": _block(SHARED_R), "PARTS": SPLIT,
        }  # fmt: skip


NOTHING = Shrunk(None, None, None, None)


def fits(*loras: MultiLoRA | None) -> bool:
    """Whether these kernels take LoRA weights of so many ranks."""
    return all(lora is None or len(lora.adapter_ids) <= MOST_RANKS for lora in loras)


def shrink(
    x: Tensor,
    lora: MultiLoRA | None,
    shared_x: Tensor,
    shared: MultiLoRA | None,
    adapter_ids_T: Tensor,
    lists: tuple[Tensor, ...],
    top_k: int,
    *,
    experts: int,
    block: int,
    options: dict[str, bool],
) -> Shrunk:
    """Products with ``a`` of the routed and of the shared experts' inputs, in one launch.

    Args:
        x: ``(T, I)``, or ``(T * A, I)`` with a row for each pair of a token and an expert.
        lora: LoRA weights of the routed experts.
        shared_x, shared: ``(T, I)`` and LoRA weights of the shared experts.
        adapter_ids_T: int32, each token's adapter id.
        lists: Rows, counts and busy experts of :mod:`aria.ops.kernels.moe_decode`.
        top_k: A.
        experts: Maximum number of busy experts; E means that the grid includes all.
        block: Tokens of a tile.
        options: Launch options.
    """
    if lora is None and shared is None:
        return NOTHING
    T = len(adapter_ids_T)
    R, SHARED_R = (0 if one is None else len(one.adapter_ids) for one in (lora, shared))
    h, shared_h = (
        x.new_empty(SPLIT, rows, r, dtype=torch.float32) if r else None for rows, r in ((T * top_k, R), (T, SHARED_R))
    )
    E = len(lists[1])
    programs = (triton.cdiv(T, block) if shared else 0) + (experts if lora else 0)
    _shrink_kernel[(programs, SPLIT)](
        x, lora and lora.a, lora and lora.adapter_ids, h, shared_x, shared and shared.a, shared and shared.adapter_ids,
        shared_h, adapter_ids_T, *lists, T,
        E=E, A=top_k, I=x.shape[1], R=R, SHARED_I=shared_x.shape[1], SHARED_R=SHARED_R, BY_ROW=len(x) > T,
        EVERY=experts == E, BLOCK_T=block, R_BLOCK=_block(R), SHARED_BLOCK=_block(SHARED_R), PARTS=SPLIT,
        **_tile(x, block, max(R, SHARED_R)), **options,
    )  # fmt: skip
    return Shrunk(h, lora and lora.b, shared_h, shared and shared.b)


def _fits_linear(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA, adapter_ids_T: Tensor) -> bool:
    return len(x_TI) <= MOST_TOKENS and x_TI.is_contiguous() and y_TO.is_contiguous() and fits(lora)


@operations.multi_lora_linear_add.register(Where.INFERENCE, fits=_fits_linear)
def multi_lora_linear_add_decode(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA, adapter_ids_T: Tensor) -> Tensor:
    """Two launches."""
    return _add(y_TO, x_TI, lora, adapter_ids_T, torch.empty_like(y_TO))


def add_in_place(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA, adapter_ids_T: Tensor) -> Tensor:
    """The same, written to ``y``."""
    return _add(y_TO, x_TI, lora, adapter_ids_T, y_TO)


def _add(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA, adapter_ids_T: Tensor, out_TO: Tensor) -> Tensor:
    (T, outputs), R, options = y_TO.shape, len(lora.adapter_ids), overlap(x_TI.device)
    assert x_TI.is_contiguous() and y_TO.is_contiguous(), "rows must be contiguous"
    h = x_TI.new_empty(SPLIT, T, R, dtype=torch.float32)
    block, ranks = {"BLOCK_T": 16, "PARTS": SPLIT} | options, {"R": R, "R_BLOCK": _block(R)}
    tiles = triton.cdiv(T, 16)
    _linear_kernel[(tiles, SPLIT)](
        x_TI, lora.a, lora.adapter_ids, h, adapter_ids_T, T, I=x_TI.shape[1], **ranks, **_tile(x_TI, 16, R), **block
    )
    _add_kernel[(triton.cdiv(outputs, 64), tiles)](
        y_TO, h, lora.b, out_TO, T, O=outputs, BLOCK_O=64, num_warps=4, **ranks, **block
    )
    return out_TO


def _tile(x: Tensor, tokens: int, ranks: int) -> dict[str, int]:
    inputs = (128 if _block(ranks) <= 64 else 64) // (4 if x.dtype == torch.float32 else 1)
    stages = stages_within(4, (tokens + _block(ranks)) * inputs * x.element_size(), x.device)
    return {"BLOCK_I": inputs, "STAGES": stages, "num_warps": 4}


def _block(ranks: int) -> int:
    """Tile size for this many ranks: at least the tensor cores' 16."""
    return max(16, triton.next_power_of_2(ranks))
