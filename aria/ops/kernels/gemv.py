"""A decoder layer's products for one token: matrix-vector kernels that run at the speed of reading weights.

D hidden, I inputs and O outputs of a linear, E experts, A experts of the token, F expert width, W width of the shared
experts (S times F).

Every program owns a few rows of a weight and multiplies them, in float32, by the whole input. RMSNorm costs no pass of
its own: ``W (g * x / rms) = (W (g * x)) / rms``, and the mean square is summed along with the product. The mixture of
experts takes three launches: router and shared gate/up (which need no routing), the chosen experts' gate/up, and all
down projections with the residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops.kernels.pdl import overlap, prefetch, release, wait


@triton.jit
def _prefetch_rows(row_ptrs, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """Ask for the rows' first BLOCK_I two-byte columns (a line holds 64 of them)."""
    line = tl.arange(0, BLOCK_I // 64) * 64
    prefetch(row_ptrs[:, None] + tl.minimum(line, I - 1)[None, :])


@triton.jit
def columns(ptrs, column, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """Load along the last axis, zeros from column I on; the bounds check is compiled out where blocks fit."""
    if I % BLOCK_I == 0:
        values = tl.load(ptrs)
    elif len(ptrs.shape) == 2:
        values = tl.load(ptrs, mask=(column < I)[None, :], other=0.0)
    else:
        values = tl.load(ptrs, mask=column < I, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _matvec_kernel(
    x_ptr, norm_ptr, w_ptr, residual_ptr, out_ptr, O, eps,
    I: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out = W x``, of the normed x and with a residual where asked."""
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    w_ptrs = w_ptr + tl.minimum(row, O - 1).to(tl.int64) * I
    if PDL:
        _prefetch_rows(w_ptrs, I, AHEAD)
    wait(PDL)
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    square = tl.zeros((BLOCK_I,), tl.float32)
    for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_I)
        x = columns(x_ptr + column, column, I, BLOCK_I)
        if NORM:
            square += x * x
            x *= columns(norm_ptr + column, column, I, BLOCK_I)
        product += columns(w_ptrs[:, None] + column[None, :], column, I, BLOCK_I) * x[None, :]
    release(PDL)
    out = tl.sum(product, axis=1)
    if NORM:
        out *= tl.rsqrt(tl.sum(square) / I + eps)
    if RESIDUAL:
        out += tl.load(residual_ptr + row, mask=row < O, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < O)


@triton.jit
def _gate_up(
    x_ptr, norm_ptr, gate_ptrs, up_ptrs, eps,
    D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up`` of BLOCK_F rows each, on the normed x; float32."""
    gate = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    square = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_D)
        x = columns(x_ptr + column, column, D, BLOCK_D)
        square += x * x
        x *= columns(norm_ptr + column, column, D, BLOCK_D)
        gate += columns(gate_ptrs[:, None] + column[None, :], column, D, BLOCK_D) * x[None, :]
        up += columns(up_ptrs[:, None] + column[None, :], column, D, BLOCK_D) * x[None, :]
    release(PDL)
    scale = tl.rsqrt(tl.sum(square) / D + eps)
    g = tl.sum(gate, axis=1) * scale
    return g * tl.sigmoid(g) * tl.sum(up, axis=1) * scale


@triton.jit
def _router_shared_kernel(
    x_ptr, norm_ptr, router_ptr, gate_ptr, up_ptr, logits_ptr, hidden_ptr, eps,
    D: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What needs no routing: the first programs compute router logits, the others the shared experts' gate and up."""
    ROUTER: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    if program < ROUTER:
        expert = program * BLOCK_E + tl.arange(0, BLOCK_E)
        row_ptrs = router_ptr + tl.minimum(expert, E - 1) * D
        wait(PDL)
        product = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        square = tl.zeros((BLOCK_D,), tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_D)
            x = columns(x_ptr + column, column, D, BLOCK_D)
            square += x * x
            x *= columns(norm_ptr + column, column, D, BLOCK_D)
            product += columns(row_ptrs[:, None] + column[None, :], column, D, BLOCK_D) * x[None, :]
        release(PDL)
        logits = tl.sum(product, axis=1) * tl.rsqrt(tl.sum(square) / D + eps)
        tl.store(logits_ptr + expert, logits, mask=expert < E)
    else:
        row = (program - ROUTER) * BLOCK_F + tl.arange(0, BLOCK_F)
        offset = tl.minimum(row, W - 1) * D
        if PDL:
            _prefetch_rows(gate_ptr + offset, D, AHEAD)
            _prefetch_rows(up_ptr + offset, D, AHEAD)
        wait(PDL)
        hidden = _gate_up(x_ptr, norm_ptr, gate_ptr + offset, up_ptr + offset, eps, D, BLOCK_F, BLOCK_D, STAGES, PDL)
        tl.store(hidden_ptr + row, hidden.to(hidden_ptr.dtype.element_ty), mask=row < W)


@triton.jit
def _choose(logits_ptr, place, E: tl.constexpr, A: tl.constexpr, E_POW2: tl.constexpr):
    """The expert with the ``place``-th largest logit, and its weight.

    An expert's place is the number of experts before it, so that all places come from one comparison of all pairs;
    of equal logits the lower expert is first.
    """
    expert = tl.arange(0, E_POW2)
    logits = tl.load(logits_ptr + expert, mask=expert < E, other=float("-inf"))
    ahead = (logits[None, :] > logits[:, None]) | (
        (logits[None, :] == logits[:, None]) & (expert[None, :] < expert[:, None])
    )
    order = tl.sum(ahead.to(tl.int32), axis=1)
    scores = tl.where(order < A, tl.exp(logits - tl.max(logits)), 0.0)
    weight = tl.sum(tl.where(order == place, scores, 0.0)) / tl.sum(scores)
    return tl.max(tl.where(order == place, expert, 0)), weight


@triton.jit
def _experts_up_kernel(
    x_ptr, norm_ptr, fc1_ptr, logits_ptr, index_ptr, hidden_ptr, eps,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr, E_POW2: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gate and up of the chosen experts, times the expert's weight. Each program finds its expert in the logits."""
    wait(PDL)
    TILES: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    place = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    expert, weight = _choose(logits_ptr, place, E, A, E_POW2)
    if tile == 0:
        tl.store(index_ptr + place, expert)
    row = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    gate_ptrs = fc1_ptr + expert.to(tl.int64) * (2 * F * D) + tl.minimum(row, F - 1) * D
    hidden = _gate_up(x_ptr, norm_ptr, gate_ptrs, gate_ptrs + F * D, eps, D, BLOCK_F, BLOCK_D, STAGES, PDL)
    tl.store(hidden_ptr + place * F + row, (hidden * weight).to(hidden_ptr.dtype.element_ty), mask=row < F)


@triton.jit
def _down_kernel(
    hidden_ptr, index_ptr, fc2_ptr, shared_ptr, residual_ptr, out_ptr,
    D: tl.constexpr, F: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Down projections of the chosen and, as S more of width F, of the shared experts; their sum and the residual."""
    row = tl.minimum(tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), D - 1)
    if PDL:
        _prefetch_rows(shared_ptr + row * (S * F), S * F, 512)
    wait(PDL)
    STEPS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    product = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    # The shared experts come first: their weights are on the way already.
    for step in tl.range(0, (S + A) * STEPS, num_stages=STAGES):
        part = step // STEPS
        column = (step % STEPS) * BLOCK_F + tl.arange(0, BLOCK_F)
        if part < S:
            base = shared_ptr + part * F
            stride = S * F
            source = (A + part) * F
        else:
            base = fc2_ptr + tl.load(index_ptr + part - S).to(tl.int64) * (D * F)
            stride = F
            source = (part - S) * F
        hidden = columns(hidden_ptr + source + column, column, F, BLOCK_F)
        product += columns(base + row[:, None] * stride + column[None, :], column, F, BLOCK_F) * hidden[None, :]
    release(PDL)
    out = tl.sum(product, axis=1)
    out += tl.load(residual_ptr + row).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tiles as measured on an H100 (docs/kernels.md).
_MATVEC = {"BLOCK_O": 8, "BLOCK_I": 512, "STAGES": 3, "AHEAD": 512, "num_warps": 4}
_ROUTER_SHARED = {"BLOCK_E": 8, "BLOCK_F": 8, "BLOCK_D": 512, "STAGES": 3, "AHEAD": 512, "num_warps": 4}
_EXPERTS_UP = {"BLOCK_F": 8, "BLOCK_D": 256, "STAGES": 4, "num_warps": 4}
_DOWN = {"BLOCK_D": 4, "BLOCK_F": 512, "STAGES": 4, "num_warps": 4}


def _matvec(
    x_1I: Tensor, weight_OI: Tensor, out_1O: Tensor, norm_I: Tensor | None, eps: float, residual_1O: Tensor | None
) -> None:
    O, I = weight_OI.shape
    _matvec_kernel[(triton.cdiv(O, _MATVEC["BLOCK_O"]),)](
        x_1I, norm_I, weight_OI, residual_1O, out_1O, O, eps,
        I=I, NORM=norm_I is not None, RESIDUAL=residual_1O is not None, **_MATVEC, **overlap(x_1I.device),
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


def fits_linear(x_TI: Tensor, *weights_OI: Tensor) -> bool:
    """Whether :func:`norm_linear` and :func:`linear_add` take these: one token, inputs a multiple of 16."""
    return (
        x_TI.shape[0] == 1
        and x_TI.shape[1] % 16 == 0
        and x_TI.dtype in DTYPES
        and all(w.is_contiguous() and w.dtype == x_TI.dtype for w in (x_TI, *weights_OI))
    )


def norm_linear(x_1D: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> Tensor:
    """:func:`aria.ops.reference.norm_linear` of one token; one launch if the weights lie in a row in memory, else one
    each."""
    assert fits_linear(x_1D, *weights_OD), "norm_linear: more than a token, or unfit sizes, dtypes or layout"
    sizes = [weight.shape[0] for weight in weights_OD]
    out = x_1D.new_empty(1, sum(sizes))
    joined = _joined(weights_OD)
    for weight, part in zip(joined, (out,) if len(joined) == 1 else out.split(sizes, dim=-1), strict=True):
        _matvec(x_1D, weight, part, norm_D, eps, None)
    return out


def linear_add(x_1I: Tensor, weight_OI: Tensor, residual_1O: Tensor) -> Tensor:
    """:func:`aria.ops.reference.linear_add` of one token."""
    assert fits_linear(x_1I, weight_OI), "linear_add: more than a token, or unfit sizes, dtypes or layout"
    out = torch.empty_like(residual_1O)
    _matvec(x_1I, weight_OI, out, None, 0.0, residual_1O)
    return out


def moe_layer(
    x_1D: Tensor,
    norm_D: Tensor,
    eps: float,
    router_ED: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    top_k: int,
) -> Tensor:
    """:func:`aria.ops.reference.moe_layer` of one token; experts laid out ``[E, out, in]``."""
    gate_WD, up_WD, down_DW = shared
    (E, D), F, W = router_ED.shape, fc2_EFD.shape[1], gate_WD.shape[0]
    logits = x_1D.new_empty(E, dtype=torch.float32)
    index = x_1D.new_empty(top_k, dtype=torch.int32)
    hidden = x_1D.new_empty(top_k * F + W)
    out = torch.empty_like(x_1D)
    options = overlap(x_1D.device)
    programs = triton.cdiv(E, _ROUTER_SHARED["BLOCK_E"]) + triton.cdiv(W, _ROUTER_SHARED["BLOCK_F"])
    _router_shared_kernel[(programs,)](
        x_1D, norm_D, router_ED, gate_WD, up_WD, logits, hidden[top_k * F :], eps,
        D=D, E=E, W=W, **_ROUTER_SHARED, **options,
    )  # fmt: skip
    _experts_up_kernel[(top_k * triton.cdiv(F, _EXPERTS_UP["BLOCK_F"]),)](
        x_1D, norm_D, fc1_EDF, logits, index, hidden, eps,
        D=D, E=E, F=F, A=top_k, E_POW2=triton.next_power_of_2(E), **_EXPERTS_UP, **options,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(D, _DOWN["BLOCK_D"]),)](
        hidden, index, fc2_EFD, down_DW, x_1D, out, D=D, F=F, A=top_k, S=W // F, **_DOWN, **options
    )
    return out
