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
def _normed_product(
    x_ptr, norm_ptr, w_ptrs, token, live, eps,
    I: tl.constexpr, NORM: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``W norm(x)``, float32 ``(BLOCK_O, BLOCK_T)``. The norm's mean square is summed along with the product."""
    product = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    square = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_I)
        w = _weights(w_ptrs, column, I, BLOCK_I)
        x = _tile(x_ptr + token * I, column, live, I, BLOCK_I)
        if NORM:
            wide = x.to(tl.float32)
            square += wide * wide
            scale = tl.load(norm_ptr + column, mask=column < I, other=0.0).to(tl.float32)
            x = (wide * scale[None, :]).to(w.dtype)
        product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
    if NORM:
        product *= tl.rsqrt(tl.sum(square, axis=1) / I + eps)[None, :]
    return product


@triton.jit
def _swiglu(gate_up, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr):
    """``silu(gate) * up`` of BLOCK_F rows of gate and then as many of up."""
    gate, up = tl.split(tl.permute(tl.reshape(gate_up, (2, BLOCK_F, BLOCK_T)), (1, 2, 0)))
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _linear_kernel(
    x_ptr, norm_ptr, w_ptr, residual_ptr, out_ptr, T, O, out_stride, eps,
    I: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out = x W^T``, of the normed x and with a residual where asked; a weight's token tiles are neighbours."""
    release(PDL)
    tiles = tl.cdiv(T, BLOCK_T)
    row = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < T
    w_ptrs = w_ptr + tl.minimum(row, O - 1).to(tl.int64) * I
    if PDL:
        line = tl.arange(0, 4) * 64
        prefetch(w_ptrs[:, None] + tl.minimum(line, I - 1)[None, :])
    wait(PDL)
    product = _normed_product(x_ptr, norm_ptr, w_ptrs, token, live, eps, I, NORM, BLOCK_O, BLOCK_T, BLOCK_I, STAGES)
    place = token[None, :] * out_stride + row[:, None]
    mask = live[None, :] & (row < O)[:, None]
    if RESIDUAL:
        product += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _router_shared_kernel(
    x_ptr, norm_ptr, router_ptr, gate_ptr, up_ptr, normed_ptr, logits_ptr, hidden_ptr, T, eps,
    D: tl.constexpr, D_POW2: tl.constexpr, E: tl.constexpr, F: tl.constexpr, W: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What needs no routing: the first T programs normalise a token each, the next compute router logits, the others
    the shared experts' ``silu(gate) * up``."""
    release(PDL)
    HALF: tl.constexpr = BLOCK_O // 2
    ROUTER: tl.constexpr = (E + BLOCK_O - 1) // BLOCK_O
    program = tl.program_id(0)
    if program < T:
        wait(PDL)
        place = tl.arange(0, D_POW2)
        x = tl.load(x_ptr + program * D + place, mask=place < D, other=0.0)
        wide = x.to(tl.float32)
        normed = (wide * tl.rsqrt(tl.sum(wide * wide) / D + eps)).to(x.dtype)
        normed *= tl.load(norm_ptr + place, mask=place < D, other=0.0)
        tl.store(normed_ptr + program * D + place, normed, mask=place < D)
    else:
        tiles = tl.cdiv(T, BLOCK_T)
        tile = (program - T) // tiles
        token = (program - T) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        live = token < T
        line = tl.arange(0, BLOCK_O)
        column = (tile - ROUTER) * HALF + line % HALF
        expert = tile * BLOCK_O + line
        shared_ptrs = tl.where(line < HALF, gate_ptr, up_ptr) + tl.minimum(column, W - 1) * D
        w_ptrs = tl.where(tile < ROUTER, router_ptr + tl.minimum(expert, E - 1) * D, shared_ptrs)
        w_ptrs = tl.multiple_of(w_ptrs, 16)
        wait(PDL)
        product = _normed_product(x_ptr, norm_ptr, w_ptrs, token, live, eps, D, True, BLOCK_O, BLOCK_T, BLOCK_D, STAGES)
        if tile < ROUTER:
            mask = live[None, :] & (expert < E)[:, None]
            tl.store(logits_ptr + token[None, :] * E + expert[:, None], product, mask=mask)
        else:
            hidden = _swiglu(product, HALF, BLOCK_T)
            unit = (tile - ROUTER) * HALF + tl.arange(0, HALF)
            # (S, T, F): each part of the shared width is an expert that has all tokens.
            cell = (unit // F * T)[:, None] * F + token[None, :] * F + (unit % F)[:, None]
            tl.store(
                hidden_ptr + cell, hidden.to(hidden_ptr.dtype.element_ty), mask=live[None, :] & (unit < W)[:, None]
            )


@triton.jit
def _lists_kernel(
    logits_ptr, weights_ptr, rows_ptr, counts_ptr, busy_ptr, T,
    E: tl.constexpr, A: tl.constexpr, E_POW2: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Top-k of every token, and the rows of every expert; one program.

    Writes weights ``(T, A)``; rows ``(E, T)``, of each expert the numbers ``t * A + choice`` of its tokens, in order;
    counts ``(E)``; busy ``(E + 1)``, the experts that have tokens, and in its last place how many these are.
    """
    release(PDL)
    wait(PDL)
    expert = tl.arange(0, E_POW2)
    counts = tl.zeros((E_POW2,), tl.int32)
    start = 0
    while start < T:
        token = start + tl.arange(0, BLOCK_T)
        logits_ptrs = logits_ptr + tl.minimum(token, T - 1)[:, None] * E + expert[None, :]
        logits = tl.load(logits_ptrs, mask=(expert < E)[None, :], other=float("-inf"))
        choice = tl.full((BLOCK_T, E_POW2), -1, tl.int32)
        largest = tl.max(logits, axis=1)
        total = tl.zeros((BLOCK_T,), tl.float32)
        rest = logits
        for place in tl.static_range(A):
            top = tl.max(rest, axis=1)
            best = tl.min(tl.where((rest == top[:, None]) & (choice < 0), expert[None, :], E_POW2), axis=1)
            chosen = expert[None, :] == best[:, None]
            choice = tl.where(chosen, place, choice)
            rest = tl.where(chosen, float("-inf"), rest)
            total += tl.exp(top - largest)
        mask = (token < T)[:, None] & (choice >= 0)
        weight = tl.exp(logits - largest[:, None]) / total[:, None]
        row = token[:, None] * A + choice
        tl.store(weights_ptr + row, weight, mask=mask)
        member = mask.to(tl.int32)
        place = counts[None, :] + tl.cumsum(member, axis=0) - 1
        tl.store(rows_ptr + expert[None, :] * T + place, row, mask=mask)
        counts += tl.sum(member, axis=0)
        start += BLOCK_T
    tl.store(counts_ptr + expert, counts, mask=expert < E)
    busy = (counts > 0).to(tl.int32)
    tl.store(busy_ptr + tl.cumsum(busy, axis=0) - 1, expert, mask=busy > 0)
    tl.store(busy_ptr + E, tl.sum(busy))


@triton.jit
def _experts_up_kernel(
    normed_ptr, fc1_ptr, weights_ptr, rows_ptr, counts_ptr, busy_ptr, hidden_ptr, T,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up`` of the chosen experts' tokens, times their weight: rows of ``(T * A, F)``."""
    release(PDL)
    wait(PDL)
    HALF: tl.constexpr = BLOCK_O // 2
    TILES: tl.constexpr = (F + HALF - 1) // HALF
    part = tl.program_id(0) // TILES
    if part >= tl.load(busy_ptr + E):
        return
    expert = tl.load(busy_ptr + part)
    count = tl.load(counts_ptr + expert)
    first = tl.program_id(0) % TILES * HALF
    line = tl.arange(0, BLOCK_O)
    column = tl.minimum(first + line % HALF, F - 1)
    w_ptrs = fc1_ptr + expert.to(tl.int64) * (2 * F * D) + (column + line // HALF * F) * D
    start = 0
    while start < count:
        place = start + tl.arange(0, BLOCK_T)
        live = place < count
        row = tl.load(rows_ptr + expert * T + place, mask=live, other=0)
        product = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for step in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            inner = step + tl.arange(0, BLOCK_D)
            w = _weights(w_ptrs, inner, D, BLOCK_D)
            x = _tile(normed_ptr + row // A * D, inner, live, D, BLOCK_D)
            product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
        hidden = _swiglu(product, HALF, BLOCK_T) * tl.load(weights_ptr + row, mask=live, other=0.0)[None, :]
        out = first + tl.arange(0, HALF)
        mask = live[None, :] & (out < F)[:, None]
        tl.store(hidden_ptr + row[None, :] * F + out[:, None], hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_T


@triton.jit
def _down_kernel(
    hidden_ptr, fc2_ptr, shared_ptr, rows_ptr, counts_ptr, busy_ptr, out_ptr, T,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Down projections of all rows ``(T * A + S * T, F)``; the shared experts are the first S parts of the grid."""
    release(PDL)
    TILES: tl.constexpr = (D + BLOCK_O - 1) // BLOCK_O
    part = tl.program_id(0) // TILES
    out = tl.program_id(0) % TILES * BLOCK_O + tl.arange(0, BLOCK_O)
    wait(PDL)
    if part >= S + tl.load(busy_ptr + E):
        return
    expert = 0
    count = T
    base = shared_ptr + part * F
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


def _rows(T: int, E: int, A: int) -> int:
    """Token tile of the experts: twice their mean number of rows, so that nearly all read their weights once."""
    return _tokens(triton.cdiv(2 * T * A, E), 64)


def _narrow(tile: dict[str, int], dtype: torch.dtype, inner: str) -> dict[str, int]:
    """The tile in four-byte numbers: a quarter as deep, which takes half the shared memory and unrolls less."""
    return tile | {inner: tile[inner] // 4} if dtype == torch.float32 else tile


# Tiles as measured on an H100 (docs/kernels.md).
_LINEAR = {"BLOCK_O": 32, "BLOCK_I": 128, "STAGES": 5, "num_warps": 4}
_SMALL_LINEAR = {"BLOCK_O": 16, "BLOCK_I": 256, "STAGES": 5, "num_warps": 4}
_ROUTER_SHARED = {"BLOCK_O": 64, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4}
_LISTS = {"BLOCK_T": 64, "num_warps": 8}
_EXPERTS_UP = {"BLOCK_O": 64, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4}
_DOWN = {"BLOCK_O": 64, "BLOCK_F": 128, "STAGES": 4, "num_warps": 4}
_COMBINE = {"BLOCK_D": 512, "num_warps": 4}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _linear(
    x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor, *, norm_I: Tensor | None = None, eps: float = 0.0,
    residual_TO: Tensor | None = None,
) -> None:  # fmt: skip
    if x_TI.shape[0] == 1:
        gemv.matvec(x_TI, weight_OI, out_TO, norm_I=norm_I, eps=eps, residual_1O=residual_TO)
        return
    T, (O, I) = x_TI.shape[0], weight_OI.shape
    tile = _narrow(_LINEAR if O * I >= 2**24 else _SMALL_LINEAR, x_TI.dtype, "BLOCK_I")
    BLOCK_T = _tokens(T, 64)
    _linear_kernel[(triton.cdiv(O, tile["BLOCK_O"]) * triton.cdiv(T, BLOCK_T),)](
        x_TI, norm_I, weight_OI, residual_TO, out_TO, T, O, out_TO.stride(0), eps,
        I=I, NORM=norm_I is not None, RESIDUAL=residual_TO is not None, BLOCK_T=BLOCK_T, **tile, **overlap(x_TI.device),
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
    sizes = [weight.shape[0] for weight in weights_OD]
    out = x_TD.new_empty(x_TD.shape[0], sum(sizes))
    joined = _joined(weights_OD)
    outs = (out,) if len(joined) == 1 else out.split(sizes, dim=-1)
    for weight, part in zip(joined, outs, strict=True):
        _linear(x_TD, weight, part, norm_I=norm_D, eps=eps)
    return out


def linear_add(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor) -> Tensor:
    """:func:`aria.ops.reference.linear_add` in one launch."""
    out = torch.empty_like(residual_TO)
    _linear(x_TI, weight_OI, out, residual_TO=residual_TO)
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
    if x_TD.shape[0] == 1:
        return gemv.moe_layer(x_TD, norm_D, eps, router_ED, fc1_EDF, fc2_EFD, shared, top_k)
    gate_WD, up_WD, down_DW = shared
    T, (E, D), F, W = x_TD.shape[0], router_ED.shape, fc2_EFD.shape[1], gate_WD.shape[0]
    A, S = top_k, W // F
    options, dtype = overlap(x_TD.device), x_TD.dtype
    normed, out = torch.empty_like(x_TD), torch.empty_like(x_TD)
    logits = x_TD.new_empty(T, E, dtype=torch.float32)
    hidden, parts = x_TD.new_empty(T * (A + S), F), x_TD.new_empty(T * (A + S), D)

    tile = _narrow(_ROUTER_SHARED, dtype, "BLOCK_D")
    BLOCK_T = _tokens(T, 64)
    tiles = triton.cdiv(E, tile["BLOCK_O"]) + triton.cdiv(W, tile["BLOCK_O"] // 2)
    _router_shared_kernel[(T + tiles * triton.cdiv(T, BLOCK_T),)](
        x_TD, norm_D, router_ED, gate_WD, up_WD, normed, logits, hidden[T * A :], T, eps,
        D=D, D_POW2=triton.next_power_of_2(D), E=E, F=F, W=W, BLOCK_T=BLOCK_T, **tile, **options,
    )  # fmt: skip

    weights = logits.new_empty(T, A)
    rows, counts, busy = (logits.new_empty(n, dtype=torch.int32) for n in (E * T, E, E + 1))
    _lists_kernel[(1,)](
        logits, weights, rows, counts, busy, T, E=E, A=A, E_POW2=triton.next_power_of_2(E), **_LISTS, **options
    )

    most, BLOCK_T = min(E, T * A), _rows(T, E, A)
    tile = _narrow(_EXPERTS_UP, dtype, "BLOCK_D")
    _experts_up_kernel[(most * triton.cdiv(F, tile["BLOCK_O"] // 2),)](
        normed, fc1_EDF, weights, rows, counts, busy, hidden, T,
        D=D, E=E, F=F, A=A, BLOCK_T=BLOCK_T, **tile, **options,
    )  # fmt: skip
    tile = _narrow(_DOWN, dtype, "BLOCK_F")
    _down_kernel[((S + most) * triton.cdiv(D, tile["BLOCK_O"]),)](
        hidden, fc2_EFD, down_DW, rows, counts, busy, parts, T,
        D=D, E=E, F=F, A=A, S=S, BLOCK_T=BLOCK_T, **tile, **options,
    )  # fmt: skip
    _combine_kernel[(T, triton.cdiv(D, _COMBINE["BLOCK_D"]))](x_TD, parts, out, T, D=D, A=A, S=S, **_COMBINE, **options)
    return out
