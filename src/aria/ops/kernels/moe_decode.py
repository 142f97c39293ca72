"""The mixture of experts for few tokens (a decode step of a batch): every weight that is needed is read once.

T tokens, D hidden, E experts, A experts of a token, F expert width, W width of the shared experts (S times F), R rows:
the T * A pairs of a token and a choice, then the T * S pairs of a token and a part of the shared width.

The products are weight-stationary: the weight is the first operand of the tensor-core product and a few tokens the
second, so that 16 tokens fill an instruction that would otherwise need 64. A small kernel lists the rows of each
expert; launches do not depend on the routing, so that a step can be captured in a CUDA graph. The LoRA term of tokens
with adapters initialises the sums of these products: a launch before each computes the product with ``a``
(:mod:`~aria.ops.kernels.multi_lora_decode`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels import gemv, multi_lora_decode
from aria.ops.kernels.gemv import DTYPES, columns
from aria.ops.kernels.multi_lora_decode import expand
from aria.ops.kernels.pdl import overlap, release, wait
from aria.ops.kernels.shared_memory import stages_within
from aria.ops.multi_lora import MoEAdapters, MultiLoRA
from aria.ops.registry import Where
from aria.ops.weights import MoEWeights


@triton.jit
def _tile(row_ptrs, column, rows, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """Columns of the rows: ``(len(rows), BLOCK_I)``; zeros where ``rows`` is false and from column I on."""
    mask = rows[:, None]
    if I % BLOCK_I != 0:
        mask = mask & (column < I)[None, :]
    return tl.load(row_ptrs[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _weights(row_ptrs, column, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """The same of a weight, all of whose rows exist."""
    if I % BLOCK_I == 0:
        values = tl.load(row_ptrs[:, None] + column[None, :])
    else:
        values = tl.load(row_ptrs[:, None] + column[None, :], mask=(column < I)[None, :], other=0.0)
    return values


@triton.jit
def _swiglu(gate_up, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr):
    """``silu(gate) * up`` of BLOCK_F rows of gate, followed by as many of up."""
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
def _norm_router_kernel(
    x_ptr, norm_ptr, router_ptr, normed_ptr, logits_ptr, busy_ptr, T, eps,
    D: tl.constexpr, D_POW2: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first T programs normalise one token each; the others compute router logits of BLOCK_T tokens, for which
    ``W (g * x / rms) = (W (g * x)) / rms``, so neither waits for the other. Sets the number of busy experts to 0."""
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
        x_ptrs = x_ptr + tl.minimum(token, T - 1)[:, None] * D
        w_ptrs = router_ptr + tl.minimum(expert, E - 1)[:, None] * D
        product = tl.zeros((BLOCK_T, BLOCK_E, BLOCK_D), tl.float32)
        square = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_D)
            x = columns(x_ptrs + column[None, :], column, D, BLOCK_D)
            square += x * x
            x *= columns(norm_ptr + column, column, D, BLOCK_D)[None, :]
            product += columns(w_ptrs + column[None, :], column, D, BLOCK_D)[None, :, :] * x[:, None, :]
        logits = tl.sum(product, axis=2) * tl.rsqrt(tl.sum(square, axis=1) / D + eps)[:, None]
        mask = (token < T)[:, None] & (expert < E)[None, :]
        tl.store(logits_ptr + token[:, None] * E + expert[None, :], logits, mask=mask)
    release(PDL)


@triton.jit
def _lists_kernel(
    logits_ptr, scores_ptr, rows_ptr, counts_ptr, busy_ptr, T,
    E: tl.constexpr, A: tl.constexpr, E_POW2: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every expert finds its own tokens: those where fewer than A logits rank before its own.

    Of equal logits the lower expert's ranks first. Writes scores ``(T, A)``, the exponentials of the chosen logits,
    largest first; rows ``(E, T)``, the indices ``t * A + choice`` of each expert's tokens, in order; counts ``(E)``;
    busy ``(E + 1)``, the experts that have tokens, in any order, and in its last element their number.
    """
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
    release(PDL)


@triton.jit
def _experts_up_kernel(
    normed_ptr, fc1_ptr, gate_ptr, up_ptr, scores_ptr, rows_ptr, counts_ptr, busy_ptr, hidden_ptr, T,
    h_ptr, b_ptr, shared_h_ptr, shared_b_ptr,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr, A_POW2: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, SHARED_R: tl.constexpr, R_BLOCK: tl.constexpr, SHARED_BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SHARED: tl.constexpr, EVERY: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up``, times the expert's weight, in rows ``(T * A + T * S, F)``.

    The shared experts, which have all tokens and no weight, are the first SHARED parts of the grid. LoRA weights of R
    ranks of the routed and SHARED_R of the shared experts add ``h b`` to gate and up.
    """
    wait(PDL)
    HALF: tl.constexpr = BLOCK_O // 2
    TILES: tl.constexpr = (F + HALF - 1) // HALF
    part = tl.program_id(0) // TILES
    if not EVERY and part >= SHARED + tl.load(busy_ptr + E):
        return
    unit = tl.program_id(0) % TILES * HALF
    line = tl.arange(0, BLOCK_O)
    column = tl.minimum(unit + line % HALF, F - 1)
    gate_base = gate_ptr + part * F * D
    up_base = up_ptr + part * F * D
    expert = 0
    count = T
    if part >= SHARED:
        expert = part - SHARED
        if not EVERY:
            expert = tl.load(busy_ptr + part - SHARED)
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
        row = T * A + place * S + part
        if part >= SHARED:
            row = tl.load(rows_ptr + expert * T + place, mask=place < T, other=0)
            token = row // A
        product = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        if R > 0 and part >= SHARED:
            b_ptrs = b_ptr + expert * (R * 2 * F) + line // HALF * F + column
            product = expand(product, b_ptrs, 2 * F, h_ptr, row, live, T * A, R, R_BLOCK, PARTS)
        if SHARED_R > 0 and part < SHARED:
            b_ptrs = shared_b_ptr + (line // HALF * (S * F) + part * F + column) * SHARED_R
            product = expand(product, b_ptrs, 1, shared_h_ptr, place, live, T, SHARED_R, SHARED_BLOCK, PARTS)
        for step in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            inner = step + tl.arange(0, BLOCK_D)
            w = _weights(w_ptrs, inner, D, BLOCK_D)
            x = _tile(normed_ptr + token * D, inner, live, D, BLOCK_D)
            product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
        hidden = _swiglu(product, HALF, BLOCK_T)
        if part >= SHARED:
            scores_ptrs = scores_ptr + token[:, None] * A + choices[None, :]
            scores = tl.load(scores_ptrs, mask=live[:, None] & (choices < A)[None, :], other=0.0)
            hidden *= (tl.load(scores_ptr + row, mask=live, other=0.0) / tl.maximum(tl.sum(scores, axis=1), 1.0))[
                None, :
            ]
        mask = live[None, :] & (out < F)[:, None]
        tl.store(hidden_ptr + row[None, :] * F + out[:, None], hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_T
    release(PDL)


@triton.jit
def _down_kernel(
    hidden_ptr, fc2_ptr, shared_ptr, rows_ptr, counts_ptr, busy_ptr, out_ptr, T,
    h_ptr, b_ptr, shared_h_ptr, shared_b_ptr,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, A: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, SHARED_R: tl.constexpr, R_BLOCK: tl.constexpr, SHARED_BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SHARED: tl.constexpr, EVERY: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Down projections of the rows ``(T * A + T * S, F)``; the shared experts are the first SHARED parts of the grid.

    The first of these parts adds the LoRA term of the shared experts, for all of them.
    """
    wait(PDL)
    TILES: tl.constexpr = (D + BLOCK_O - 1) // BLOCK_O
    part = tl.program_id(0) // TILES
    if not EVERY and part >= SHARED + tl.load(busy_ptr + E):
        return
    out = tl.program_id(0) % TILES * BLOCK_O + tl.arange(0, BLOCK_O)
    base = shared_ptr + part * F
    expert = 0
    count = T
    stride = S * F
    if part >= SHARED:
        expert = part - SHARED
        if not EVERY:
            expert = tl.load(busy_ptr + part - SHARED)
        count = tl.load(counts_ptr + expert)
        base = fc2_ptr + expert.to(tl.int64) * (D * F)
        stride = F
    w_ptrs = base + tl.minimum(out, D - 1) * stride
    start = 0
    while start < count:
        place = start + tl.arange(0, BLOCK_T)
        live = place < count
        row = T * A + place * S + part
        if part >= SHARED:
            row = tl.load(rows_ptr + expert * T + place, mask=place < T, other=0)
        product = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        if R > 0 and part >= SHARED:
            b_ptrs = b_ptr + expert * (R * D) + tl.minimum(out, D - 1)
            product = expand(product, b_ptrs, D, h_ptr, row, live, T * A, R, R_BLOCK, PARTS)
        if SHARED > 0 and SHARED_R > 0 and part == 0:
            b_ptrs = shared_b_ptr + tl.minimum(out, D - 1) * SHARED_R
            product = expand(product, b_ptrs, 1, shared_h_ptr, place, live, T, SHARED_R, SHARED_BLOCK, PARTS)
        for step in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            inner = step + tl.arange(0, BLOCK_F)
            w = _weights(w_ptrs, inner, F, BLOCK_F)
            x = _tile(hidden_ptr + row * F, inner, live, F, BLOCK_F)
            product = tl.dot(w, tl.trans(x), product, input_precision="ieee")
        mask = live[None, :] & (out < D)[:, None]
        tl.store(out_ptr + row[None, :] * D + out[:, None], product.to(out_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_T
    release(PDL)


@triton.jit
def _combine_kernel(
    x_ptr, parts_ptr, out_ptr, T,
    D: tl.constexpr, A: tl.constexpr, SHARED: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The residual plus a token's rows, which are already weighted: A routed and SHARED shared ones."""
    wait(PDL)
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = column < D
    total = tl.load(x_ptr + token * D + column, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(A):
        total += tl.load(parts_ptr + (token * A + choice) * D + column, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(SHARED):
        total += tl.load(parts_ptr + (T * A + token * SHARED + part) * D + column, mask=mask, other=0.0).to(tl.float32)
    release(PDL)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=mask)


# Tiles as measured on an H100 (docs/lab/kernels.md).
_ROUTER = {"BLOCK_E": 8, "BLOCK_T": 1, "BLOCK_D": 512, "STAGES": 3, "num_warps": 4}
_ROUTER_MANY = {"BLOCK_E": 8, "BLOCK_T": 4, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4}
_LISTS = {"BLOCK_T": 64, "num_warps": 8}
_UP = {"BLOCK_O": 64, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4}
_UP_WIDE = {"BLOCK_O": 64, "BLOCK_D": 128, "STAGES": 5, "num_warps": 4}
_DOWN = {"BLOCK_O": 64, "BLOCK_F": 128, "STAGES": 4, "num_warps": 4}
_DOWN_WIDE = {"BLOCK_O": 128, "BLOCK_F": 128, "STAGES": 3, "num_warps": 8}
_COMBINE = {"BLOCK_D": 512, "num_warps": 4}

MOST_TOKENS = 256
"""Above, experts are better multiplied as tiles (docs/lab/kernels.md)."""
_WIDEST = 64
"""Maximum number of tokens of a tile."""
_TOGETHER = 16
"""Tokens up to which shared and routed experts use the same tile, and so one launch. Above, so few experts have no
tokens that the grid includes all of them."""


def _block(rows: int) -> int:
    """Tile size for this many rows: a power of two, at least the tensor cores' 16."""
    return min(max(16, triton.next_power_of_2(rows)), _WIDEST)


def _narrow(tile: dict[str, int], dtype: torch.dtype, inner: str) -> dict[str, int]:
    """The tile for float32: a quarter of the depth, which uses half the shared memory and unrolls less."""
    return tile | {inner: max(16, tile[inner] // 4)} if dtype == torch.float32 else tile


def _fitted(tile: dict[str, int], tokens: int, inner: str, x: Tensor) -> dict[str, int]:
    """The tile for products with this many tokens: as :func:`_narrow`, with the stages that fit into shared memory."""
    tile = _narrow(tile, x.dtype, inner)
    step = (tile["BLOCK_O"] + tokens) * tile[inner] * x.element_size()
    return tile | {"STAGES": stages_within(tile["STAGES"], step, x.device)}


def serves(weights: MoEWeights) -> bool:
    """Whether the kernels can use these weights: experts laid out ``[E, out, in]``, sizes that are multiples of 16, and
    a shared width that is a multiple of the experts'."""
    fc1_EDF, fc2_EFD, shared = weights.fc1, weights.fc2, weights.shared
    return (
        fc1_EDF.dtype in DTYPES
        and all(w.is_contiguous() for w in (*shared, fc1_EDF.transpose(1, 2), fc2_EFD.transpose(1, 2)))
        and all(w.dtype == fc1_EDF.dtype for w in (fc2_EFD, *shared))
        and fc1_EDF.shape[1] % 16 == fc2_EFD.shape[1] % 16 == 0
        and shared[0].shape[0] % fc2_EFD.shape[1] == 0
    )


def fits(x_TD: Tensor, weights: MoEWeights, adapters: MoEAdapters | None = None) -> bool:
    """Whether the kernels take these tokens: few enough that experts are better read as weights than multiplied as
    tiles (docs/lab/kernels.md), with adapters that :func:`multi_lora_decode.fits`."""
    return (
        len(x_TD) <= MOST_TOKENS
        and x_TD.dtype == weights.fc1.dtype
        and x_TD.is_contiguous()
        and (adapters is None or multi_lora_decode.fits(*adapters.loras))
    )


def _route(
    x_TD: Tensor, norm_D: Tensor, eps: float, router_ED: Tensor, normed_TD: Tensor, top_k: int
) -> tuple[Tensor, ...]:
    """Fill ``normed``; scores, rows, counts and busy experts as :func:`_lists_kernel` writes them."""
    (T, D), E = x_TD.shape, router_ED.shape[0]
    options, pow2 = overlap(x_TD.device), triton.next_power_of_2
    logits, scores = (x_TD.new_empty(T, n, dtype=torch.float32) for n in (E, top_k))
    rows, counts, busy = (x_TD.new_empty(n, dtype=torch.int32) for n in (E * T, E, E + 1))
    tile = _narrow(_ROUTER if T <= 64 else _ROUTER_MANY, x_TD.dtype, "BLOCK_D")
    programs = T + triton.cdiv(E, tile["BLOCK_E"]) * triton.cdiv(T, tile["BLOCK_T"])
    _norm_router_kernel[(programs,)](
        x_TD, norm_D, router_ED, normed_TD, logits, busy, T, eps, D=D, D_POW2=pow2(D), E=E, **tile, **options
    )
    _lists_kernel[(E,)](logits, scores, rows, counts, busy, T, E=E, A=top_k, E_POW2=pow2(E), **_LISTS, **options)
    return scores, rows, counts, busy


@operations.moe_layer.register(Where.INFERENCE, serves=serves, fits=fits)
def moe_layer_decode(x_TD: Tensor, weights: MoEWeights, adapters: MoEAdapters | None = None) -> Tensor:
    """One to a few hundred tokens, without waiting for the host.

    Args:
        weights: Experts have shapes ``(E, D, 2F)`` and ``(E, F, D)`` and memory ``[E, out, in]``; see :func:`serves`.
        adapters: See :func:`fits`.
    """
    assert weights.served(serves), "moe_layer: unfit sizes, dtypes or layout of the experts"
    if x_TD.shape[0] == 1 and adapters is None:
        return gemv.moe_one_token(x_TD, weights)
    norm_D, eps, router_ED, top_k = weights.norm, weights.eps, weights.router, weights.top_k
    fc1_EDF, fc2_EFD, (gate_WD, up_WD, down_DW) = weights.fc1, weights.fc2, weights.shared
    T, (E, D), F, A = x_TD.shape[0], router_ED.shape, fc2_EFD.shape[1], top_k
    S, options = gate_WD.shape[0] // F, overlap(x_TD.device)
    together = T <= _TOGETHER
    beside = S if together else 0
    # Twice the mean number of rows per expert, so that nearly all experts read their weights once.
    block, experts = _block(triton.cdiv(2 * T * A, E)), min(E, T * A) if together else E
    normed, out = torch.empty_like(x_TD), torch.empty_like(x_TD)
    hidden, parts = (x_TD.new_empty(T * (A + S), n) for n in (F, D))
    sizes = {"D": D, "E": E, "F": F, "A": A, "S": S, "EVERY": not together}

    lists = _route(x_TD, norm_D, eps, router_ED, normed, A)

    def shrunk(
        x: Tensor, lora: MultiLoRA | None, shared_x: Tensor, shared_lora: MultiLoRA | None
    ) -> multi_lora_decode.Shrunk:
        if adapters is None:
            return multi_lora_decode.NOTHING
        return multi_lora_decode.shrink(
            x, lora, shared_x, shared_lora, adapters.adapter_ids, lists[1:], A, experts=experts, block=block,
            options=options,
        )  # fmt: skip

    fc1_lora, fc2_lora, gate_up_lora, down_lora = (None,) * 4 if adapters is None else adapters.loras
    shrunk_up = shrunk(normed, fc1_lora, normed, gate_up_lora)

    def up(tile: dict[str, int], block: int, beside: int, experts: int) -> None:
        tile = _fitted(tile, block, "BLOCK_D", normed)
        _experts_up_kernel[((beside + experts) * triton.cdiv(F, tile["BLOCK_O"] // 2),)](
            normed, fc1_EDF, gate_WD, up_WD, *lists, hidden, T,
            A_POW2=triton.next_power_of_2(A), SHARED=beside, BLOCK_T=block, **shrunk_up.arguments(), **sizes, **tile,
            **options,
        )  # fmt: skip

    if not together:
        up(_UP, _block(T), S, 0)
    up(_UP if block < _WIDEST else _UP_WIDE, block, beside, experts)
    tile = _fitted(_DOWN if block < _WIDEST else _DOWN_WIDE, block, "BLOCK_F", hidden)
    of_shared = hidden[T * A :].view(T, S * F)
    shrunk_down = shrunk(hidden[: T * A], fc2_lora, of_shared, down_lora if together else None)
    _down_kernel[((beside + experts) * triton.cdiv(D, tile["BLOCK_O"]),)](
        hidden, fc2_EFD, down_DW, *lists[1:], parts, T, SHARED=beside, BLOCK_T=block, **shrunk_down.arguments(),
        **sizes, **tile, **options,
    )  # fmt: skip
    if not together:
        down = torch.mm(of_shared, down_DW.t(), out=parts[T * A : T * A + T])
        if down_lora is not None and adapters is not None:
            multi_lora_decode.add_in_place(down, of_shared, down_lora, adapters.adapter_ids)
    _combine_kernel[(T, triton.cdiv(D, _COMBINE["BLOCK_D"]))](
        x_TD, parts, out, T, D=D, A=A, SHARED=beside or 1, **_COMBINE, **options
    )
    return out
