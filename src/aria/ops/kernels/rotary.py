"""Rotary positions and the write to the paged cache for the tokens of a prompt, in one pass.

T tokens, H heads, KV key/value heads, K head width, B blocks of the cache, S tokens of a block, P positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.registry import Where
from aria.ops.weights import PagedKV


# The number of tokens and the alignment of slices of them change from step to step.
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotate_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, slots_ptr, angles_ptr, keys_ptr, values_ptr, turned_q_ptr, turned_k_ptr,
    T, q_stride, k_stride, v_stride,
    H: tl.constexpr, KV: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and HEADS heads; the halves of a head are loaded separately, since each is rotated by the other."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < T
    there = inside[:, None]
    low = tl.arange(0, K // 2)[None, :]
    high = low + K // 2
    angles = angles_ptr + tl.load(positions_ptr + token, mask=inside, other=0).to(tl.int64)[:, None] * K
    cos = tl.load(angles + low, mask=there, other=0.0)
    sin = tl.load(angles + high, mask=there, other=0.0)
    slot = tl.load(slots_ptr + token, mask=inside, other=0)
    row = token.to(tl.int64)
    dtype = keys_ptr.dtype.element_ty
    for index in range(HEADS):
        head = tl.program_id(1) * HEADS + index
        if head < H:
            x = q_ptr + (row * q_stride + head * K)[:, None]
            out = turned_q_ptr + ((row * H + head) * K)[:, None]
            a = tl.load(x + low, mask=there, other=0.0).to(tl.float32)
            b = tl.load(x + high, mask=there, other=0.0).to(tl.float32)
            tl.store(out + low, a * cos - b * sin, mask=there)
            tl.store(out + high, b * cos + a * sin, mask=there)
        if head < KV:
            place = (((slot // S).to(tl.int64) * KV + head) * S + slot % S) * K
            x = k_ptr + (row * k_stride + head * K)[:, None]
            out = turned_k_ptr + ((row * KV + head) * K)[:, None]
            a = tl.load(x + low, mask=there, other=0.0).to(tl.float32)
            b = tl.load(x + high, mask=there, other=0.0).to(tl.float32)
            turned_a, turned_b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
            tl.store(out + low, turned_a, mask=there)
            tl.store(out + high, turned_b, mask=there)
            tl.store(keys_ptr + place[:, None] + low, turned_a, mask=there)
            tl.store(keys_ptr + place[:, None] + high, turned_b, mask=there)
            both = tl.arange(0, K)[None, :]
            v = tl.load(v_ptr + (row * v_stride + head * K)[:, None] + both, mask=there)
            tl.store(values_ptr + place[:, None] + both, v, mask=there)


_TOKENS = 16


def fits(q_THK: Tensor, *_: object) -> bool:
    """Whether the kernel takes this head width: a power of two."""
    K = q_THK.shape[2]
    return 2 <= K <= 256 and K & (K - 1) == 0


@operations.rotate_and_cache.register(Where.INFERENCE, fits=fits)
def rotate_and_cache_triton(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, positions_T: Tensor, slots_T: Tensor, cache: PagedKV
) -> tuple[Tensor, Tensor]:
    """Rotate q and k and write k and v to the cache in one pass."""
    T, H, K = q_THK.shape
    keys_BHSK, values_BHSK, angles_PK, _ = cache
    _, KV, S, _ = keys_BHSK.shape
    assert fits(q_THK), f"heads of {K} are no power of two"
    assert all(x.stride()[1:] == (K, 1) for x in (q_THK, k_THK, v_THK)), "heads of a token must be adjacent"
    assert keys_BHSK.is_contiguous() and values_BHSK.is_contiguous(), "the cache of a layer must be contiguous"
    q = torch.empty(T, H, K, dtype=q_THK.dtype, device=q_THK.device)
    k = torch.empty(T, KV, K, dtype=k_THK.dtype, device=k_THK.device)
    if T:
        heads = 2 if T <= 1024 else 5  # fewer heads give more programs
        _rotate_kernel[triton.cdiv(T, _TOKENS), triton.cdiv(H, heads)](
            q_THK, k_THK, v_THK, positions_T, slots_T, angles_PK, keys_BHSK, values_BHSK, q, k,
            T, q_THK.stride(0), k_THK.stride(0), v_THK.stride(0),
            H=H, KV=KV, S=S, K=K, TOKENS=_TOKENS, HEADS=heads, num_warps=4,
        )  # fmt: skip
    return q, k
