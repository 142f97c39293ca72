"""A decoder layer's products for one token: matrix-vector kernels that run at the speed of reading weights.

D hidden, I inputs and O outputs of a linear layer, E experts, A experts of the token, F expert width, W width of the
shared experts (S times F).

Every program has a few rows of a weight and multiplies them, in float32, by the whole input. RMSNorm needs no separate
pass: ``W (g * x / rms) = (W (g * x)) / rms``, and the mean square is summed along with the product. The mixture of
experts takes three launches: the router, gate/up of the shared experts (which need no routing) and of the chosen ones,
and all down projections with the residual.

Memory should be busy even while a kernel ends. Weights do not depend on other kernels, so a program loads its first
blocks of them into registers before it waits for its input, and lets the next kernel start and do the same. This uses
the memory bandwidth that the small kernels in between (attention, router) leave idle.
"""

# Tuples are concatenated: Triton has no unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels.pdl import overlap, release, wait
from aria.ops.layout import adjacent, as_one
from aria.ops.registry import Where
from aria.ops.weights import MoEWeights


@triton.jit
def _load(ptrs, column, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """Load along the last axis, zeros from column I on; the bounds check is compiled out where blocks fit."""
    if I % BLOCK_I == 0:
        values = tl.load(ptrs)
    elif len(ptrs.shape) == 2:
        values = tl.load(ptrs, mask=(column < I)[None, :], other=0.0)
    else:
        values = tl.load(ptrs, mask=column < I, other=0.0)
    return values


@triton.jit
def columns(ptrs, column, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """The same in float32."""
    return _load(ptrs, column, I, BLOCK_I).to(tl.float32)


@triton.jit
def _hold(ptrs, I: tl.constexpr, BLOCK_I: tl.constexpr, HELD: tl.constexpr):
    """The first HELD blocks of a vector, or of the rows that start at ``ptrs``; they stay in registers."""
    held = ()
    for block in tl.static_range(HELD):
        column = block * BLOCK_I + tl.arange(0, BLOCK_I)
        if len(ptrs.shape) == 1:
            held = held + (_load(ptrs[:, None] + column[None, :], column, I, BLOCK_I),)
        else:
            held = held + (_load(ptrs + column, column, I, BLOCK_I),)
    return held


@triton.jit
def _input(x_ptr, norm_ptr, column, I: tl.constexpr, BLOCK_I: tl.constexpr, NORM: tl.constexpr):
    """A block of the input, times the norm's weights if NORM, and its squares."""
    x = columns(x_ptr + column, column, I, BLOCK_I)
    square = x * x
    if NORM:
        x *= columns(norm_ptr + column, column, I, BLOCK_I)
    return x, square


@triton.jit
def _matvec_kernel(
    x_ptr, norm_ptr, w_ptr, residual_ptr, out_ptr, O, eps,
    I: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out = W x``, of the normed x if NORM, plus a residual if RESIDUAL."""
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    w_ptrs = w_ptr + tl.minimum(row, O - 1).to(tl.int64) * I
    weights = _hold(w_ptrs, I, BLOCK_I, HELD)
    norms = ()
    if NORM:
        norms = _hold(norm_ptr, I, BLOCK_I, HELD)
    release(PDL)
    wait(PDL)
    xs = _hold(x_ptr, I, BLOCK_I, HELD)
    product = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    square = tl.zeros((BLOCK_I,), tl.float32)
    for start in tl.range(HELD * BLOCK_I, I, BLOCK_I, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_I)
        x, squares = _input(x_ptr, norm_ptr, column, I, BLOCK_I, NORM)
        square += squares
        product += columns(w_ptrs[:, None] + column[None, :], column, I, BLOCK_I) * x[None, :]
    for block in tl.static_range(HELD):
        x = xs[block].to(tl.float32)
        square += x * x
        if NORM:
            x *= norms[block].to(tl.float32)
        product += weights[block].to(tl.float32) * x[None, :]
    out = tl.sum(product, axis=1)
    if NORM:
        out *= tl.rsqrt(tl.sum(square) / I + eps)
    if RESIDUAL:
        out += tl.load(residual_ptr + row, mask=row < O, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < O)


@triton.jit
def _gate_up(
    x_ptr, norm_ptr, gate_ptrs, up_ptrs, gates, ups, norms, eps,
    D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up`` of BLOCK_F rows each, on the normed x; float32. ``gates``, ``ups`` and ``norms`` are held."""
    HELD: tl.constexpr = len(gates)
    xs = _hold(x_ptr, D, BLOCK_D, HELD)
    gate = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    square = tl.zeros((BLOCK_D,), tl.float32)
    # Before the loop, which then can use their registers.
    for block in tl.static_range(HELD):
        x = xs[block].to(tl.float32)
        square += x * x
        x *= norms[block].to(tl.float32)
        gate += gates[block].to(tl.float32) * x[None, :]
        up += ups[block].to(tl.float32) * x[None, :]
    for start in tl.range(HELD * BLOCK_D, D, BLOCK_D, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_D)
        x, squares = _input(x_ptr, norm_ptr, column, D, BLOCK_D, True)
        square += squares
        gate += columns(gate_ptrs[:, None] + column[None, :], column, D, BLOCK_D) * x[None, :]
        up += columns(up_ptrs[:, None] + column[None, :], column, D, BLOCK_D) * x[None, :]
    scale = tl.rsqrt(tl.sum(square) / D + eps)
    g = tl.sum(gate, axis=1) * scale
    return g * tl.sigmoid(g) * tl.sum(up, axis=1) * scale


@triton.jit
def _choose(logits_ptr, place, E: tl.constexpr, A: tl.constexpr, E_POW2: tl.constexpr):
    """The expert with the ``place``-th largest logit, and its weight.

    An expert's place is the number of experts that rank before it, so one comparison of all pairs gives all places; of
    equal logits the lower expert ranks first.
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
def _up_kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, fc1_ptr, logits_ptr, index_ptr, hidden_ptr, eps,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr, W: tl.constexpr, E_POW2: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gate and up: the first programs take the shared experts, which keep memory busy while the router finishes; the
    others take the chosen experts, times the expert's weight, and find their expert in the logits."""
    SHARED: tl.constexpr = (W + BLOCK_F - 1) // BLOCK_F
    TILES: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0)
    release(PDL)
    if program < SHARED:
        row = program * BLOCK_F + tl.arange(0, BLOCK_F)
        gate_ptrs = gate_ptr + tl.minimum(row, W - 1) * D
        up_ptrs = up_ptr + tl.minimum(row, W - 1) * D
        gates, ups = _hold(gate_ptrs, D, BLOCK_D, HELD), _hold(up_ptrs, D, BLOCK_D, HELD)
        norms = _hold(norm_ptr, D, BLOCK_D, HELD)
        wait(PDL)
        hidden = _gate_up(x_ptr, norm_ptr, gate_ptrs, up_ptrs, gates, ups, norms, eps, D, BLOCK_F, BLOCK_D, STAGES)
        tl.store(hidden_ptr + A * F + row, hidden.to(hidden_ptr.dtype.element_ty), mask=row < W)
    else:
        place = (program - SHARED) // TILES
        tile = (program - SHARED) % TILES
        wait(PDL)
        expert, weight = _choose(logits_ptr, place, E, A, E_POW2)
        if tile == 0:
            tl.store(index_ptr + place, expert)
        row = tile * BLOCK_F + tl.arange(0, BLOCK_F)
        gate_ptrs = fc1_ptr + expert.to(tl.int64) * (2 * F * D) + tl.minimum(row, F - 1) * D
        up_ptrs = gate_ptrs + F * D
        hidden = _gate_up(x_ptr, norm_ptr, gate_ptrs, up_ptrs, (), (), (), eps, D, BLOCK_F, BLOCK_D, STAGES)
        tl.store(hidden_ptr + place * F + row, (hidden * weight).to(hidden_ptr.dtype.element_ty), mask=row < F)


@triton.jit
def _down_kernel(
    hidden_ptr, index_ptr, fc2_ptr, shared_ptr, residual_ptr, out_ptr,
    D: tl.constexpr, F: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, HELD: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Down projections of the chosen and, as S more of width F, of the shared experts; their sum and the residual."""
    row = tl.minimum(tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), D - 1)
    STEPS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    # The shared experts come first: they need no routing.
    weights = _hold(shared_ptr + row * (S * F), F, BLOCK_F, HELD)
    release(PDL)
    wait(PDL)
    hiddens = _hold(hidden_ptr + A * F, F, BLOCK_F, HELD)
    product = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    for step in tl.range(HELD, (S + A) * STEPS, num_stages=STAGES):
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
    for step in tl.static_range(HELD):
        product += weights[step].to(tl.float32) * hiddens[step].to(tl.float32)[None, :]
    out = tl.sum(product, axis=1)
    out += tl.load(residual_ptr + row).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tiles as measured on an H100 (docs/lab/kernels.md); the second one is for weights that fit into registers as a whole.
_MATVEC = {"BLOCK_O": 8, "BLOCK_I": 512, "HELD": 2, "STAGES": 4, "num_warps": 4}
_MATVEC_SMALL = {"BLOCK_O": 8, "BLOCK_I": 512, "HELD": 5, "STAGES": 3, "num_warps": 4}
_ROUTER = {"BLOCK_O": 1, "BLOCK_I": 512, "HELD": 5, "STAGES": 3, "num_warps": 4}
_UP = {"BLOCK_F": 8, "BLOCK_D": 256, "HELD": 4, "STAGES": 4, "num_warps": 4}
_DOWN = {"BLOCK_D": 4, "BLOCK_F": 512, "HELD": 4, "STAGES": 5, "num_warps": 4}


def _clipped(tile: dict[str, int], inputs: int, block: str) -> dict[str, int]:
    """The tile, with at most as many held blocks as there are."""
    return tile | {"HELD": min(tile["HELD"], triton.cdiv(inputs, tile[block]))}


def _matvec(
    x_1I: Tensor, weight_OI: Tensor, out_1O: Tensor, tile: dict[str, int],
    norm_I: Tensor | None = None, eps: float = 0.0, residual_1O: Tensor | None = None,
) -> None:  # fmt: skip
    O, I = weight_OI.shape
    _matvec_kernel[(triton.cdiv(O, tile["BLOCK_O"]),)](
        x_1I, norm_I, weight_OI, residual_1O, out_1O, O, eps, I=I, NORM=norm_I is not None,
        RESIDUAL=residual_1O is not None, **_clipped(tile, I, "BLOCK_I"), **overlap(x_1I.device),
    )  # fmt: skip


def fits_linear(x_TI: Tensor, *weights_OI: Tensor) -> bool:
    """Whether the linear layers of this file take these: one token, inputs a multiple of 16."""
    return (
        x_TI.shape[0] == 1
        and x_TI.shape[1] % 16 == 0
        and x_TI.dtype in DTYPES
        and all(w.is_contiguous() and w.dtype == x_TI.dtype for w in (x_TI, *weights_OI))
    )


def _fits_norm(x_TD: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> bool:
    return fits_linear(x_TD, *weights_OD)


def _fits_add(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor) -> bool:
    return fits_linear(x_TI, weight_OI)


@operations.norm_linear.register(Where.INFERENCE, fits=_fits_norm)
def norm_linear_matvec(x_TD: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> Tensor:
    """One token: one launch if the weights are adjacent in memory, else one each."""
    assert fits_linear(x_TD, *weights_OD), "norm_linear: more than a token, or unfit sizes, dtypes or layout"
    sizes = [weight.shape[0] for weight in weights_OD]
    out = x_TD.new_empty(1, sum(sizes))
    joined = (as_one(weights_OD),) if adjacent(weights_OD) else weights_OD
    for weight, part in zip(joined, (out,) if len(joined) == 1 else out.split(sizes, dim=-1), strict=True):
        _matvec(x_TD, weight, part, _MATVEC, norm_D, eps)
    return out


@operations.linear_add.register(Where.INFERENCE, fits=_fits_add)
def linear_add_matvec(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor) -> Tensor:
    """One token."""
    assert fits_linear(x_TI, weight_OI), "linear_add: more than a token, or unfit sizes, dtypes or layout"
    out = torch.empty_like(residual_TO)
    _matvec(x_TI, weight_OI, out, _MATVEC_SMALL, residual_1O=residual_TO)
    return out


@operations.linear.register(Where.INFERENCE, fits=fits_linear)
def linear_matvec(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """One token."""
    assert fits_linear(x_TI, weight_OI), "linear: more than a token, or unfit sizes, dtypes or layout"
    out = x_TI.new_empty(1, weight_OI.shape[0])
    _matvec(x_TI, weight_OI, out, _MATVEC)
    return out


def moe_one_token(x_1D: Tensor, weights: MoEWeights) -> Tensor:
    """:func:`aria.ops.moe_layer` of one token without adapters, with the experts' memory laid out ``[E, out, in]``."""
    norm_D, eps, router_ED, top_k = weights.norm, weights.eps, weights.router, weights.top_k
    fc1_EDF, fc2_EFD, (gate_WD, up_WD, down_DW) = weights.fc1, weights.fc2, weights.shared
    (E, D), F, W = router_ED.shape, fc2_EFD.shape[1], gate_WD.shape[0]
    logits = x_1D.new_empty(E, dtype=torch.float32)
    index = x_1D.new_empty(top_k, dtype=torch.int32)
    hidden = x_1D.new_empty(top_k * F + W)
    out = torch.empty_like(x_1D)
    options = overlap(x_1D.device)
    _matvec(x_1D, router_ED, logits, _ROUTER, norm_D, eps)
    programs = triton.cdiv(W, _UP["BLOCK_F"]) + top_k * triton.cdiv(F, _UP["BLOCK_F"])
    _up_kernel[(programs,)](
        x_1D, norm_D, gate_WD, up_WD, fc1_EDF, logits, index, hidden, eps,
        D=D, E=E, F=F, A=top_k, W=W, E_POW2=triton.next_power_of_2(E), **_clipped(_UP, D, "BLOCK_D"), **options,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(D, _DOWN["BLOCK_D"]),)](
        hidden, index, fc2_EFD, down_DW, x_1D, out,
        D=D, F=F, A=top_k, S=W // F, **_clipped(_DOWN, F, "BLOCK_F"), **options,
    )  # fmt: skip
    return out
