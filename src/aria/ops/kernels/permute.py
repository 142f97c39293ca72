"""Routing without the host: norm, top-k, each token's place among its experts' rows, permutation and combination.

Rows of the routed experts are sorted by expert, then by token, and every expert starts at a whole tile of
:mod:`aria.ops.kernels.grouped_gemm`; the rows that pad its last tile are undefined and never read back. There are no
atomics: the same tokens get the same places in every run.

T tokens, D hidden, E experts, A experts per token, N blocks of tokens, P rows of the routed experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.registry import Where


def block_of(tokens: int) -> int:
    """Tokens that one program routes: each program reads the router's weight, but enough of them must fill the GPU."""
    return 16 if tokens <= 4096 else 32


@triton.jit
def _choose(logits, t, T, e, weights_ptr, index_ptr, counts_ptr, E, A: tl.constexpr, A_BLOCK: tl.constexpr):
    """Top-k of a block of logits, float32 ``(tokens, experts)``, the lower index first among equal logits; a softmax
    over the chosen ones; and how many of the block's tokens chose each expert."""
    a = tl.arange(0, A_BLOCK)
    chosen = tl.full((logits.shape[0], A_BLOCK), float("-inf"), tl.float32)
    counts = tl.zeros(logits.shape, tl.int32)
    for i in tl.static_range(A):
        best, place = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
        place = tl.minimum(place, E - 1)  # with NaN any lane may win, even one past the end
        tl.store(index_ptr + t * A + i, place, mask=t < T)
        chosen = tl.where(a[None, :] == i, best[:, None], chosen)
        won = e[None, :] == place[:, None]
        counts += won.to(tl.int32)
        logits = tl.where(won, float("-inf"), logits)
    powers = tl.exp(chosen - tl.max(chosen, 1)[:, None])
    weights = powers / tl.sum(powers, 1)[:, None]
    inside = (t < T)[:, None]
    tl.store(weights_ptr + t[:, None] * A + a[None, :], weights, mask=inside & (a < A)[None, :])
    tl.store(counts_ptr + tl.program_id(0) * E + e, tl.sum(tl.where(inside, counts, 0), 0), mask=e < E)


@triton.jit(do_not_specialize=["T"])
def _route(
    logits_ptr, weights_ptr, index_ptr, counts_ptr, T, E: tl.constexpr, A: tl.constexpr,
    T_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr, A_BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * T_BLOCK + tl.arange(0, T_BLOCK)
    e = tl.arange(0, E_BLOCK)
    inside = (t < T)[:, None] & (e < E)[None, :]
    logits = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    _choose(logits, t, T, e, weights_ptr, index_ptr, counts_ptr, E, A, A_BLOCK)


@triton.jit(do_not_specialize=["T"])
def _norm_route(
    x_ptr, norm_ptr, router_ptr, normed_ptr, weights_ptr, index_ptr, counts_ptr, T, eps,
    D: tl.constexpr, E: tl.constexpr, A: tl.constexpr,
    T_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr, A_BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * T_BLOCK + tl.arange(0, T_BLOCK)
    d = tl.arange(0, D_BLOCK)
    e = tl.arange(0, E_BLOCK)
    at = t.to(tl.int64)[:, None] * D + d[None, :]

    squares = tl.zeros((T_BLOCK, D_BLOCK), tl.float32)
    for start in tl.range(0, D, D_BLOCK):
        inside = (t < T)[:, None] & (start + d < D)[None, :]
        x = tl.load(x_ptr + at + start, mask=inside, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 1) / D + eps)

    # The second reading of x finds it in the cache.
    logits = tl.zeros((T_BLOCK, E_BLOCK), tl.float32)
    for start in tl.range(0, D, D_BLOCK):
        inside = (t < T)[:, None] & (start + d < D)[None, :]
        x = tl.load(x_ptr + at + start, mask=inside, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + start + d, mask=start + d < D, other=0.0)
        normed = (x * scale[:, None]).to(norm.dtype) * norm[None, :]
        tl.store(normed_ptr + at + start, normed, mask=inside)
        near = (e < E)[:, None] & (start + d < D)[None, :]
        router = tl.load(router_ptr + e[:, None] * D + start + d[None, :], mask=near, other=0.0)
        logits = tl.dot(normed, router.T, logits, input_precision="ieee")
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    _choose(logits, t, T, e, weights_ptr, index_ptr, counts_ptr, E, A, A_BLOCK)


@triton.jit(do_not_specialize=["T", "N", "M"])
def _place(
    index_ptr, counts_ptr, position_ptr, tiles_ptr, T, N, M,
    E: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    T_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    e = tl.arange(0, E_BLOCK)
    n = tl.arange(0, N_BLOCK)
    total = tl.zeros((N_BLOCK, E_BLOCK), tl.int32)
    before = tl.zeros((N_BLOCK, E_BLOCK), tl.int32)
    for start in tl.range(0, N, N_BLOCK):
        inside = (start + n < N)[:, None] & (e < E)[None, :]
        counts = tl.load(counts_ptr + (start + n)[:, None] * E + e[None, :], mask=inside, other=0)
        total += counts
        before += tl.where((start + n < block * BLOCKS)[:, None], counts, 0)
    total, before = tl.sum(total, 0), tl.sum(before, 0)
    tiles = (total + TILE - 1) // TILE
    ends = tl.cumsum(tiles, 0)

    # Each program writes a part of the table: the number of tiles, then the expert of each.
    if block == 0:
        tl.store(tiles_ptr, tl.sum(tiles, 0))
    for start in tl.range(block * M_BLOCK, M, tl.num_programs(0) * M_BLOCK):
        m = start + tl.arange(0, M_BLOCK)
        expert = tl.sum((ends[None, :] <= m[:, None]).to(tl.int32), 1)
        tl.store(tiles_ptr + 1 + m, expert, mask=m < M)

    t = block * T_BLOCK + tl.arange(0, T_BLOCK)
    chosen = tl.zeros((T_BLOCK, E_BLOCK), tl.int32)
    for i in tl.static_range(A):
        place = tl.load(index_ptr + t * A + i, mask=t < T, other=-1)
        chosen += (e[None, :] == place[:, None]).to(tl.int32)
    row = ((ends - tiles) * TILE + before)[None, :] + tl.cumsum(chosen, 0) - chosen
    for i in tl.static_range(A):
        place = tl.load(index_ptr + t * A + i, mask=t < T, other=-1)
        mine = tl.sum(tl.where(e[None, :] == place[:, None], row, 0), 1)
        tl.store(position_ptr + t * A + i, mine, mask=t < T)


@triton.jit
def _permute(x_ptr, position_ptr, out_ptr, D: tl.constexpr, A: tl.constexpr, D_BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    x = tl.load(x_ptr + t * D + d, mask=d < D)
    for i in tl.static_range(A):
        row = tl.load(position_ptr + t * A + i).to(tl.int64)
        tl.store(out_ptr + row * D + d, x, mask=d < D)


@triton.jit
def _combine(
    x_ptr,
    shared_ptr,
    y_ptr,
    weights_ptr,
    position_ptr,
    out_ptr,
    D: tl.constexpr,
    A: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    out = tl.load(shared_ptr + t * D + d, mask=d < D).to(tl.float32)
    for i in tl.static_range(A):
        row = tl.load(position_ptr + t * A + i).to(tl.int64)
        weight = tl.load(weights_ptr + t * A + i)
        out += weight * tl.load(y_ptr + row * D + d, mask=d < D).to(tl.float32)
    out += tl.load(x_ptr + t * D + d, mask=d < D).to(tl.float32)
    tl.store(out_ptr + t * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


@operations.route.register(Where.INFERENCE)
def route_triton(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of equal logits the lower index wins."""
    T, E = logits_TE.shape
    weights, index, counts, block = _outputs(logits_TE, E, top_k, index=torch.int64)
    _route[(counts.shape[0],)](
        logits_TE.contiguous(), weights, index, counts, T, E, top_k,
        T_BLOCK=block, E_BLOCK=triton.next_power_of_2(E), A_BLOCK=triton.next_power_of_2(top_k),
    )  # fmt: skip
    return weights.to(logits_TE.dtype), index


def norm_route(
    x_TD: Tensor, norm_D: Tensor, eps: float, router_ED: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm, router logits and :func:`aria.ops.route` in one pass over the tokens.

    Returns:
        The normed tokens ``(T, D)``, weights ``(T, A)`` float32, experts ``(T, A)`` int32, and for every block of
        :func:`block_of` tokens how many chose each expert, ``(N, E)`` int32.
    """
    T, D = x_TD.shape
    E = router_ED.shape[0]
    normed = torch.empty_like(x_TD)
    weights, index, counts, block = _outputs(x_TD, E, top_k, index=torch.int32)
    _norm_route[(counts.shape[0],)](
        x_TD, norm_D, router_ED, normed, weights, index, counts, T, eps, D, E, top_k,
        T_BLOCK=block, D_BLOCK=128, E_BLOCK=max(triton.next_power_of_2(E), 16), A_BLOCK=triton.next_power_of_2(top_k),
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return normed, weights, index, counts


def _outputs(like: Tensor, E: int, A: int, index: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    T, device = like.shape[0], like.device
    block = block_of(T)
    weights = torch.empty(T, A, dtype=torch.float32, device=device)
    chosen = torch.empty(T, A, dtype=index, device=device)
    return weights, chosen, torch.empty(triton.cdiv(T, block), E, dtype=torch.int32, device=device), block


def place(index_TA: Tensor, counts_NE: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The rows of each token's copies, and the expert of each tile.

    Args:
        index_TA, counts_NE: From :func:`norm_route`.
        tile: Rows of a tile; each expert starts at a multiple of it.

    Returns:
        Rows ``(T, A)`` int32, and a table int32: the number of tiles in use, then the expert of each tile. Its length
        is one more than the maximum number of tiles.
    """
    (T, A), (N, E) = index_TA.shape, counts_NE.shape
    M = T * A // tile + min(E, T * A)
    position = torch.empty_like(index_TA, dtype=torch.int32)
    tiles = torch.empty(1 + M, dtype=torch.int32, device=index_TA.device)
    blocks = 1 if N <= 256 else 4
    _place[(triton.cdiv(N, blocks),)](
        index_TA, counts_NE, position, tiles, T, N, M, E, A, tile, BLOCKS=blocks,
        T_BLOCK=block_of(T) * blocks, E_BLOCK=triton.next_power_of_2(E), N_BLOCK=64, M_BLOCK=32, num_warps=8,
    )  # fmt: skip
    return position, tiles


def permute(x_TD: Tensor, position_TA: Tensor, rows: int) -> Tensor:
    """Copies of each token in their rows, ``(rows, D)``; the other rows are undefined."""
    T, D = x_TD.shape
    out = torch.empty(rows, D, dtype=x_TD.dtype, device=x_TD.device)
    _permute[(T,)](x_TD, position_TA, out, D, position_TA.shape[1], D_BLOCK=triton.next_power_of_2(D))
    return out


def combine(x_TD: Tensor, shared_TD: Tensor, y_PD: Tensor, weights_TA: Tensor, position_TA: Tensor) -> Tensor:
    """``x + shared + weighted sum of the token's rows of y``, in float32 in the order of the choices."""
    T, D = x_TD.shape
    out = torch.empty_like(x_TD)
    _combine[(T,)](
        x_TD, shared_TD, y_PD, weights_TA, position_TA, out, D, position_TA.shape[1], D_BLOCK=triton.next_power_of_2(D)
    )
    return out
