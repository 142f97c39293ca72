"""Packed attention: PyTorch's kernels, dense where lengths are equal, and one of our own for the vision encoder."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops.reference import cache_new
from aria.ops.segments import Segments


def attention(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, *, causal: bool
) -> Tensor:
    """See :func:`aria.ops.reference.attention`."""
    assert len(queries.lengths) == len(keys.lengths), "queries and keys have different numbers of segments"
    # A kernel of our own for the heads of the vision encoder, which no library is made for; it has no gradients.
    if q_THK.is_cuda and not causal and not torch.is_grad_enabled() and 64 < q_THK.shape[-1] <= 80:
        kernel = _hopper_kernel()
        if kernel is not None and kernel.fits(q_THK, k_SHK, v_SHK):
            return kernel.attention(q_THK, k_SHK, v_SHK, queries, keys)
    square = queries.longest in (1, keys.longest)
    if queries.equal and keys.equal and (square or not causal):
        batch = len(queries.lengths)
        dense = (x.view(batch, -1, *x.shape[1:]) for x in (q_THK, k_SHK, v_SHK))
        return _dense(*dense, causal=causal and queries.longest > 1).flatten(0, 1)
    half = q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16) and q_THK.shape[-1] % 8 == 0
    if half and torch.cuda.get_device_capability(q_THK.device) >= (8, 0):  # flash attention's oldest
        # PyTorch 2.11 has no grouped queries here, so keys and values are repeated where there are fewer.
        groups = q_THK.shape[1] // k_SHK.shape[1]
        k_SHK, v_SHK = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_SHK, v_SHK))
        # Here, because it brings all of torch.compile along: 1.5 s that a CPU need not wait for.
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q_THK, k_SHK, v_SHK, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest,
            window_size=(-1, 0) if causal else (-1, -1),
        )  # fmt: skip
        assert isinstance(out, Tensor), "no auxiliary output was asked for"
        return out
    pieces = zip(q_THK.split(queries.lengths), k_SHK.split(keys.lengths), v_SHK.split(keys.lengths), strict=True)
    return torch.cat([_one(q, k, v, causal) for q, k, v in pieces])


def paged_attention(
    q_NHK: Tensor, keys_BHSK: Tensor, values_BHSK: Tensor, blocks_NM: Tensor, lengths_N: Tensor
) -> Tensor:
    """See :func:`aria.ops.reference.paged_attention`; each sequence reads its own blocks, however long others are."""
    S, out_NHK = keys_BHSK.shape[2], torch.empty_like(q_NHK)
    for q_HK, blocks_M, length, out_HK in zip(q_NHK, blocks_NM, lengths_N.tolist(), out_NHK, strict=True):
        used = blocks_M[: -(-length // S)]
        # (M, KV, S, K) -> (1, length, KV, K)
        k, v = (
            cache.index_select(0, used).transpose(1, 2).flatten(0, 1)[None, :length]
            for cache in (keys_BHSK, values_BHSK)
        )
        out_HK.copy_(_dense(q_HK[None, None], k, v, causal=False)[0, 0])
    return out_NHK


def decode_attention(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    positions_N: Tensor,
    blocks_NM: Tensor,
    angles_PK: Tensor,
    keys_BHSK: Tensor,
    values_BHSK: Tensor,
) -> Tensor:
    """See :func:`aria.ops.reference.decode_attention`."""
    q_NHK = cache_new(q_NHK, k_NHK, v_NHK, positions_N, blocks_NM, angles_PK, keys_BHSK, values_BHSK)
    return paged_attention(q_NHK, keys_BHSK, values_BHSK, blocks_NM, positions_N + 1)


@cache
def _hopper_kernel() -> ModuleType | None:
    """The kernel for heads of 72, if there is a Triton that has what it is written in."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.experimental.gluon") is None:
        return None
    return importlib.import_module("aria.ops.kernels.vision_attention")


def _one(q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, causal: bool) -> Tensor:
    """One segment; its queries are the last ones of its keys."""
    T, S = q_THK.shape[0], k_SHK.shape[0]
    mask = None
    if causal and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_THK.device).tril(S - T)
    return _dense(q_THK[None], k_SHK[None], v_SHK[None], causal=causal and T > 1 and mask is None, mask=mask)[0]


def _dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None) -> Tensor:
    """Scaled-dot-product attention of ``(N, T, H, K)`` tensors."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)
