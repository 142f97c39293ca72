"""A decoder layer's products for few tokens (a decode step of a batch): every weight that is needed is read once.

T tokens, D hidden, I inputs and O outputs of a linear, E experts, A experts of a token, F expert width, W width of the
shared experts (S times F), R rows: the T * A pairs of a token and a choice, then S * T of the shared experts.

The products are weight-stationary: the weight is the first operand of the tensor cores' product and a few tokens the
second, so that 16 tokens fill an instruction that would otherwise want 64. Experts get lists of their rows from one
small kernel; nothing depends on the routing but what is in memory, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops.kernels import gemv
from aria.ops.kernels.pdl import overlap, prefetch, release, wait


@triton.jit
def _tile(row_ptrs, column, rows, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """Columns of the rows: ``(len(rows), BLOCK_I)``; zeros where ``rows`` is false and from column I on."""
    mask = rows[:, None]
    if I % BLOCK_I != 0:
        mask = mask & (column < I)[None, :]
    return tl.load(row_ptrs[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _weights(row_ptrs, column, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """The same of a weight, of which all rows are there."""
    if I % BLOCK_I == 0:
        values = tl.load(row_ptrs[:, None] + column[None, :])
    else:
        values = tl.load(row_ptrs[:, None] + column[None, :], mask=(column < I)[None, :], other=0.0)
    return values


@triton.jit
def _prefetch_rows(row_ptrs, I: tl.constexpr, COLUMNS: tl.constexpr):
    """Ask for the first COLUMNS two-byte columns of the rows; a line holds 64 of them."""
    for start in tl.static_range(0, COLUMNS, 512):
        line = tl.minimum(start + tl.arange(0, 8) * 64, I - 1)
        prefetch(row_ptrs[:, None] + line[None, :])


@triton.jit
def _swiglu(gate_up, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr):
    """``silu(gate) * up`` of BLOCK_F rows of gate and then as many of up."""
    gate, up = tl.split(tl.permute(tl.reshape(gate_up, (2, BLOCK_F, BLOCK_T)), (1, 2, 0)))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _normalise(x_ptr, norm_ptr, out_ptr, token, eps, D: tl.constexpr, D_POW2: tl.constexpr):
    column = tl.arange(0, D_POW2)
    x = tl.load(x_ptr + token * D + column, mask=column < D, other=0.0)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide) / D + eps)).to(x.dtype)
    normed *= tl.load(norm_ptr + column, mask=column < D, other=0.0)
    tl.store(out_ptr + token * D + column, normed, mask=column < D)


@triton.jit
def _norm_kernel(x_ptr, norm_ptr, out_ptr, eps, D: tl.constexpr, D_POW2: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    wait(PDL)
    _normalise(x_ptr, norm_ptr, out_ptr, tl.program_id(0), eps, D, D_POW2)


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, residual_ptr, out_ptr, T, O, out_stride,
    I: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out = x W^T``, with a residual where asked; a weight's token tiles are neighbours.

    The inputs are cut in SPLIT shares, one for each warp: an instruction of the tensor cores waits for the sum before
    it, and one chain over all inputs would take longer than reading the weight.
    """
    release(PDL)
    tiles = tl.cdiv(T, BLOCK_T)
    row = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < T
    row_ptrs = w_ptr + tl.minimum(row, O - 1).to(tl.int64) * I
    if PDL:
        _prefetch_rows(row_ptrs, I, AHEAD)
    SHARE: tl.constexpr = (I + SPLIT * 16 - 1) // (SPLIT * 16) * 16
    first = tl.arange(0, SPLIT)[:, None, None] * SHARE
    w_ptrs = row_ptrs[None, :, None] + first
    x_ptrs = x_ptr + token[None, :, None] * I + first
    wait(PDL)
    product = tl.zeros((SPLIT, BLOCK_O, BLOCK_T), tl.float32)
    for start in tl.range(0, SHARE, BLOCK_I, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_I)[None, None, :]
        if SHARE * SPLIT == I and SHARE % BLOCK_I == 0:
            w = tl.load(w_ptrs + column)
            x = tl.load(x_ptrs + column, mask=live[None, :, None], other=0.0)
        else:
            inside = (column < SHARE) & (first + column < I)
            w = tl.load(w_ptrs + column, mask=inside, other=0.0)
            x = tl.load(x_ptrs + column, mask=live[None, :, None] & inside, other=0.0)
        product = tl.dot(w, tl.permute(x, (0, 2, 1)), product, input_precision="ieee")
    out = tl.sum(product, axis=0)
    place = token[None, :] * out_stride + row[:, None]
    mask = live[None, :] & (row < O)[:, None]
    if RESIDUAL:
        out += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_router_kernel(
    x_ptr, norm_ptr, router_ptr, normed_ptr, logits_ptr, busy_ptr, T, eps,
    D: tl.constexpr, D_POW2: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The first T programs normalise a token each; the others compute router logits of BLOCK_T tokens, for which
    ``W (g * x / rms) = (W (g * x)) / rms``, so that neither waits for the other. The count of busy experts starts at 0."""
    release(PDL)
    program = tl.program_id(0)
    wait(PDL)
    if program < T:
        if program == 0:
            tl.store(busy_ptr + E, 0)
        _normalise(x_ptr, norm_ptr, normed_ptr, program, eps, D, D_POW2)
    else:
        tiles = tl.cdiv(T, BLOCK_T)
        expert = (program - T) // tiles * BLOCK_E + tl.arange(0, BLOCK_E)
        token = (program - T) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        live = token < T
        SHARE: tl.constexpr = (D + SPLIT * 16 - 1) // (SPLIT * 16) * 16
        first = tl.arange(0, SPLIT)[:, None, None] * SHARE
        w_ptrs = router_ptr + tl.minimum(expert, E - 1)[None, :, None] * D + first
        x_ptrs = x_ptr + token[None, :, None] * D + first
        product = tl.zeros((SPLIT, BLOCK_E, BLOCK_T), tl.float32)
        square = tl.zeros((SPLIT, BLOCK_T, BLOCK_D), tl.float32)
        for start in tl.range(0, SHARE, BLOCK_D, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_D)[None, None, :]
            inside = (column < SHARE) & (first + column < D)
            w = tl.load(w_ptrs + column, mask=inside, other=0.0)
            x = tl.load(x_ptrs + column, mask=live[None, :, None] & inside, other=0.0).to(tl.float32)
            scale = tl.load(norm_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
            square += x * x
            scaled = (x * scale).to(w.dtype)
            product = tl.dot(w, tl.permute(scaled, (0, 2, 1)), product, input_precision="ieee")
        mean = tl.sum(tl.sum(square, axis=2), axis=0) / D
        logits = tl.sum(product, axis=0) * tl.rsqrt(mean + eps)[None, :]
        mask = live[None, :] & (expert < E)[:, None]
        tl.store(logits_ptr + token[None, :] * E + expert[:, None], logits, mask=mask)


@triton.jit
def _lists_kernel(
    logits_ptr, scores_ptr, rows_ptr, counts_ptr, busy_ptr, T,
    E: tl.constexpr, A: tl.constexpr, E_POW2: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every expert finds its own tokens: those where fewer than A logits come before its own.

    Of equal logits the lower expert's comes first. Writes scores ``(T, A)``, the exponentials of the chosen logits,
    largest first; rows ``(E, T)``, of each expert the numbers ``t * A + choice`` of its tokens, in order; counts
    ``(E)``; busy ``(E + 1)``, the experts that have tokens, in any order, and in its last place how many these are.
    """
    release(PDL)
    wait(PDL)
    expert = tl.program_id(0)
    other = tl.arange(0, E_POW2)
    count = 0
    start = 0
    while start < T:
        token = start + tl.arange(0, BLOCK_T)
        row_ptrs = logits_ptr + tl.minimum(token, T - 1) * E
        mine = tl.load(row_ptrs + expert)
        logits = tl.load(row_ptrs[:, None] + other[None, :], mask=(other < E)[None, :], other=float("-inf"))
        before = (logits > mine[:, None]) | ((logits == mine[:, None]) & (other < expert)[None, :])
        choice = tl.sum(before.to(tl.int32), axis=1)
        member = (choice < A) & (token < T)
        row = token * A + choice
        tl.store(scores_ptr + row, tl.exp(mine - tl.max(logits, axis=1)), mask=member)
        place = count + tl.cumsum(member.to(tl.int32), axis=0) - 1
        tl.store(rows_ptr + expert * T + place, row, mask=member)
        count += tl.sum(member.to(tl.int32))
        start += BLOCK_T
    tl.store(counts_ptr + expert, count)
    if count > 0:
        tl.store(busy_ptr + tl.atomic_add(busy_ptr + E, 1), expert)


@triton.jit
def _experts_up_kernel(
    normed_ptr, fc1_ptr, gate_ptr, up_ptr, scores_ptr, rows_ptr, counts_ptr, busy_ptr, hidden_ptr, T,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr, A_POW2: tl.constexpr, S: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up``, times the expert's weight, in rows ``(T * A + S * T, F)``.

    The shared experts, which have all tokens, are the first S parts of the grid: their weights are on the way while
    the routing is being found."""
    release(PDL)
    HALF: tl.constexpr = BLOCK_O // 2
    TILES: tl.constexpr = (F + HALF - 1) // HALF
    part = tl.program_id(0) // TILES
    unit = tl.program_id(0) % TILES * HALF
    line = tl.arange(0, BLOCK_O)
    column = tl.minimum(unit + line % HALF, F - 1)
    gate_base = gate_ptr + part * F * D
    up_base = up_ptr + part * F * D
    if part < S and PDL:
        _prefetch_rows(tl.where(line < HALF, gate_base, up_base) + column * D, D, AHEAD)
    wait(PDL)
    if part >= S + tl.load(busy_ptr + E):
        return
    expert = 0
    count = T
    if part >= S:
        expert = tl.load(busy_ptr + part - S)
        count = tl.load(counts_ptr + expert)
        gate_base = fc1_ptr + expert.to(tl.int64) * (2 * F * D)
        up_base = gate_base + F * D
    w_ptrs = tl.where(line < HALF, gate_base, up_base) + column * D
    choices = tl.arange(0, A_POW2)
    out = unit + tl.arange(0, HALF)
    start = 0
    while start < count:
        place = start + tl.arange(0, BLOCK_T)
        live = place < count
        token = place
        row = T * A + part * T + place
        if part >= S:
            row = tl.load(rows_ptr + expert * T + place, mask=live, other=0)
            token = row // A
        product = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for step in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            inner = step + tl.arange(0, BLOCK_D)
            w = _weights(w_ptrs, inner, D, BLOCK_D)
            x = _tile(normed_ptr + token * D, inner, live, D, BLOCK_D)
            product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
        hidden = _swiglu(product, HALF, BLOCK_T)
        if part >= S:
            scores_ptrs = scores_ptr + token[:, None] * A + choices[None, :]
            scores = tl.load(scores_ptrs, mask=live[:, None] & (choices < A)[None, :], other=0.0)
            hidden *= (tl.load(scores_ptr + row, mask=live, other=0.0) / tl.maximum(tl.sum(scores, axis=1), 1.0))[
                None, :
            ]
        mask = live[None, :] & (out < F)[:, None]
        tl.store(hidden_ptr + row[None, :] * F + out[:, None], hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_T


@triton.jit
def _down_kernel(
    hidden_ptr, fc2_ptr, shared_ptr, rows_ptr, counts_ptr, busy_ptr, out_ptr, T,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Down projections of all rows ``(T * A + S * T, F)``; the shared experts are the first S parts of the grid."""
    release(PDL)
    TILES: tl.constexpr = (D + BLOCK_O - 1) // BLOCK_O
    part = tl.program_id(0) // TILES
    out = tl.program_id(0) % TILES * BLOCK_O + tl.arange(0, BLOCK_O)
    base = shared_ptr + part * F
    if part < S and PDL:
        _prefetch_rows(base + tl.minimum(out, D - 1) * (S * F), F, AHEAD)
    wait(PDL)
    if part >= S + tl.load(busy_ptr + E):
        return
    expert = 0
    count = T
    stride = S * F
    if part >= S:
        expert = tl.load(busy_ptr + part - S)
        count = tl.load(counts_ptr + expert)
        base = fc2_ptr + expert.to(tl.int64) * (D * F)
        stride = F
    w_ptrs = base + tl.minimum(out, D - 1) * stride
    start = 0
    while start < count:
        place = start + tl.arange(0, BLOCK_T)
        live = place < count
        row = T * A + part * T + place
        if part >= S:
            row = tl.load(rows_ptr + expert * T + place, mask=live, other=0)
        product = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for step in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            inner = step + tl.arange(0, BLOCK_F)
            w = _weights(w_ptrs, inner, F, BLOCK_F)
            x = _tile(hidden_ptr + row * F, inner, live, F, BLOCK_F)
            product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
        mask = live[None, :] & (out < D)[:, None]
        tl.store(out_ptr + row[None, :] * D + out[:, None], product.to(out_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_T


@triton.jit
def _combine_kernel(
    x_ptr, parts_ptr, out_ptr, T,
    D: tl.constexpr, A: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The residual plus a token's A routed and S shared rows, which carry their weights already."""
    release(PDL)
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = column < D
    wait(PDL)
    total = tl.load(x_ptr + token * D + column, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(A):
        total += tl.load(parts_ptr + (token * A + choice) * D + column, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(S):
        total += tl.load(parts_ptr + (T * A + part * T + token) * D + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def _tokens(T: int, most: int) -> int:
    """Token tile: a power of two that holds T, from 16 (an instruction of the tensor cores) to ``most``."""
    return min(max(16, triton.next_power_of_2(T)), most)


def _narrow(tile: dict[str, int], dtype: torch.dtype, inner: str) -> dict[str, int]:
    """The tile in four-byte numbers: a quarter as deep, which takes half the shared memory and unrolls less."""
    return tile | {inner: max(16, tile[inner] // 4)} if dtype == torch.float32 else tile


# Tiles as measured on an H100 (docs/kernels.md).
_LINEAR = {"BLOCK_O": 32, "BLOCK_I": 128, "SPLIT": 4, "STAGES": 4, "AHEAD": 1024, "num_warps": 4}
_SMALL_LINEAR = {"BLOCK_O": 16, "BLOCK_I": 128, "SPLIT": 4, "STAGES": 5, "AHEAD": 2560, "num_warps": 4}
_ROUTER = {"BLOCK_E": 16, "BLOCK_T": 16, "BLOCK_D": 64, "SPLIT": 4, "STAGES": 4, "num_warps": 4}
_LISTS = {"BLOCK_T": 64, "num_warps": 4}
_FEWEST = 2
"""Tokens up to which experts have so few that a tile is cut in two, so that all processors get their share."""
_UP = {"BLOCK_O": 64, "BLOCK_D": 128, "STAGES": 4, "AHEAD": 2560, "num_warps": 4}
_UP_FEWEST = {"BLOCK_O": 32, "BLOCK_D": 128, "STAGES": 4, "AHEAD": 2560, "num_warps": 4}
_DOWN = {"BLOCK_O": 64, "BLOCK_F": 128, "STAGES": 4, "AHEAD": 1024, "num_warps": 4}
_DOWN_FEWEST = {"BLOCK_O": 32, "BLOCK_F": 128, "STAGES": 6, "AHEAD": 1024, "num_warps": 4}
_COMBINE = {"BLOCK_D": 512, "num_warps": 4}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _rows(T: int, E: int, A: int) -> int:
    """Token tile of the experts: twice their mean number of rows, so that nearly all read their weights once."""
    return _tokens(triton.cdiv(2 * T * A, E), 64)


def _linear(x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor, residual_TO: Tensor | None = None) -> None:
    T, (O, I) = x_TI.shape[0], weight_OI.shape
    tile = _narrow(_LINEAR if O * I >= 2**24 else _SMALL_LINEAR, x_TI.dtype, "BLOCK_I")
    BLOCK_T = _tokens(T, 32)
    if BLOCK_T > 16:
        tile = tile | {"BLOCK_I": tile["BLOCK_I"] // 2}
    _linear_kernel[(triton.cdiv(O, tile["BLOCK_O"]) * triton.cdiv(T, BLOCK_T),)](
        x_TI, weight_OI, residual_TO, out_TO, T, O, out_TO.stride(0),
        I=I, RESIDUAL=residual_TO is not None, BLOCK_T=BLOCK_T, **tile, **overlap(x_TI.device),
    )  # fmt: skip


def _joined(weights_OI: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Weights that lie one behind the other in one storage, as one."""
    first = weights_OI[0]
    end = first.storage_offset()
    for weight in weights_OI:
        if weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or weight.storage_offset() != end:
            return weights_OI
        end += weight.numel()
    rows = sum(weight.shape[0] for weight in weights_OI)
    return (first.detach().as_strided((rows, first.shape[1]), first.stride()),)


def norm_linear(x_TD: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> Tensor:
    """:func:`aria.ops.reference.norm_linear` in one launch if the weights lie in a row in memory, else one each."""
    (T, D), sizes = x_TD.shape, [weight.shape[0] for weight in weights_OD]
    out = x_TD.new_empty(T, sum(sizes))
    joined = _joined(weights_OD)
    outs = (out,) if len(joined) == 1 else out.split(sizes, dim=-1)
    normed = x_TD
    if T > 1:
        normed = torch.empty_like(x_TD)
        _norm_kernel[(T,)](
            x_TD, norm_D, normed, eps, D=D, D_POW2=triton.next_power_of_2(D), num_warps=4, **overlap(x_TD.device)
        )
    for weight, part in zip(joined, outs, strict=True):
        if T > 1:
            _linear(normed, weight, part)
        else:
            gemv.matvec(x_TD, weight, part, norm_I=norm_D, eps=eps)
    return out


def linear_add(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor) -> Tensor:
    """:func:`aria.ops.reference.linear_add` in one launch."""
    out = torch.empty_like(residual_TO)
    if x_TI.shape[0] == 1:
        gemv.matvec(x_TI, weight_OI, out, residual_1O=residual_TO)
    else:
        _linear(x_TI, weight_OI, out, residual_TO)
    return out


def fits_linear(x_TI: Tensor, *weights_OI: Tensor) -> bool:
    """Whether :func:`norm_linear` and :func:`linear_add` take these."""
    return (
        x_TI.is_contiguous()
        and x_TI.dtype in _DTYPES
        and x_TI.shape[1] % 16 == 0
        and all(w.is_contiguous() and w.dtype == x_TI.dtype for w in weights_OI)
    )


def fits_moe(x_TD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor, shared: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether :func:`moe_layer` takes these: experts laid out ``[E, out, in]``, sizes that are multiples of 16, and a
    shared width that is a multiple of the experts'."""
    return (
        fits_linear(x_TD, *shared)
        and fc1_EDF.transpose(1, 2).is_contiguous()
        and fc2_EFD.transpose(1, 2).is_contiguous()
        and fc1_EDF.dtype == fc2_EFD.dtype == x_TD.dtype
        and fc2_EFD.shape[1] % 16 == 0
        and shared[0].shape[0] % fc2_EFD.shape[1] == 0
    )


def moe_layer(
    x_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    router_ED: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    top_k: int,
) -> Tensor:
    """:func:`aria.ops.reference.moe_layer` of one to some hundred tokens, in three launches (one token) or five.

    Args:
        fc1_EDF, fc2_EFD: shapes ``(E, D, 2F)`` and ``(E, F, D)``, memory ``[E, out, in]``; see :func:`fits_moe`.
    """
    assert fits_moe(x_TD, fc1_EDF, fc2_EFD, shared), "moe_layer: unfit sizes, dtypes or layout of the experts"
    gate_WD, up_WD, down_DW = shared
    T, (E, D), F, W = x_TD.shape[0], router_ED.shape, fc2_EFD.shape[1], gate_WD.shape[0]
    A, S, dtype, options = top_k, W // F, x_TD.dtype, overlap(x_TD.device)
    normed, out = torch.empty_like(x_TD), torch.empty_like(x_TD)
    logits, scores = (x_TD.new_empty(T, n, dtype=torch.float32) for n in (E, A))
    rows, counts, busy = (x_TD.new_empty(n, dtype=torch.int32) for n in (E * T, E, E + 1))
    hidden, parts = (x_TD.new_empty(T * (A + S), n) for n in (F, D))

    tile = _narrow(_ROUTER, dtype, "BLOCK_D")
    tiles = triton.cdiv(E, tile["BLOCK_E"]) * triton.cdiv(T, tile["BLOCK_T"])
    _norm_router_kernel[(T + tiles,)](
        x_TD, norm_D, router_ED, normed, logits, busy, T, eps,
        D=D, D_POW2=triton.next_power_of_2(D), E=E, **tile, **options,
    )  # fmt: skip
    _lists_kernel[(E,)](
        logits, scores, rows, counts, busy, T, E=E, A=A, E_POW2=triton.next_power_of_2(E), **_LISTS, **options
    )
    most, BLOCK_T = S + min(E, T * A), _rows(T, E, A)
    tile = _narrow(_UP if T > _FEWEST else _UP_FEWEST, dtype, "BLOCK_D")
    _experts_up_kernel[(most * triton.cdiv(F, tile["BLOCK_O"] // 2),)](
        normed, fc1_EDF, gate_WD, up_WD, scores, rows, counts, busy, hidden, T,
        D=D, E=E, F=F, A=A, A_POW2=triton.next_power_of_2(A), S=S, BLOCK_T=BLOCK_T, **tile, **options,
    )  # fmt: skip
    tile = _narrow(_DOWN if T > _FEWEST else _DOWN_FEWEST, dtype, "BLOCK_F")
    _down_kernel[(most * triton.cdiv(D, tile["BLOCK_O"]),)](
        hidden, fc2_EFD, down_DW, rows, counts, busy, parts, T,
        D=D, E=E, F=F, A=A, S=S, BLOCK_T=BLOCK_T, **tile, **options,
    )  # fmt: skip
    _combine_kernel[(T, triton.cdiv(D, _COMBINE["BLOCK_D"]))](x_TD, parts, out, T, D=D, A=A, S=S, **_COMBINE, **options)
    return out
