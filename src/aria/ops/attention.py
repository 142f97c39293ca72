"""Attention by PyTorch's kernels: packed, dense where lengths are equal; and paged, for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops import operations
from aria.ops.reference import cache_new
from aria.ops.registry import Where
from aria.ops.segments import Segments
from aria.ops.weights import PagedKV


@operations.attention.register(Where.ANYWHERE)
def attention_torch(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, *, causal: bool
) -> Tensor:
    """PyTorch's attention, dense where lengths are equal."""
    assert len(queries.lengths) == len(keys.lengths), "queries and keys have different numbers of segments"
    square = queries.longest in (1, keys.longest)
    if queries.equal and keys.equal and (square or not causal):
        batch = len(queries.lengths)
        dense = (x.view(batch, -1, *x.shape[1:]) for x in (q_THK, k_SHK, v_SHK))
        return _dense(*dense, causal=causal and queries.longest > 1).flatten(0, 1)
    half = q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16) and q_THK.shape[-1] % 8 == 0
    if half and torch.cuda.get_device_capability(q_THK.device) >= (8, 0):  # flash attention's oldest
        # PyTorch 2.11 has no grouped queries here, so fewer keys and values are repeated.
        groups = q_THK.shape[1] // k_SHK.shape[1]
        k_SHK, v_SHK = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_SHK, v_SHK))
        # Here, because it imports all of torch.compile, 1.5 s that CPUs do not need.
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q_THK, k_SHK, v_SHK, queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest,
            window_size=(-1, 0) if causal else (-1, -1),
        )  # fmt: skip
        assert isinstance(out, Tensor), "no auxiliary output was asked for"
        return out
    pieces = zip(q_THK.split(queries.lengths), k_SHK.split(keys.lengths), v_SHK.split(keys.lengths), strict=True)
    return torch.cat([_one(q, k, v, causal) for q, k, v in pieces])


def _on_cpu(q_NHK: Tensor, *_: object) -> bool:
    # A GPU would have to wait for the lengths; the reference does not, and so can be part of a CUDA graph.
    return not q_NHK.is_cuda


@operations.paged_attention.register(Where.ANYWHERE, fits=_on_cpu)
def paged_attention_per_sequence(q_NHK: Tensor, cache: PagedKV, blocks_NM: Tensor, lengths_N: Tensor) -> Tensor:
    """Each sequence reads only its own blocks."""
    S, out_NHK = cache.keys.shape[2], torch.empty_like(q_NHK)
    for q_HK, blocks_M, length, out_HK in zip(q_NHK, blocks_NM, lengths_N.tolist(), out_NHK, strict=True):
        used = blocks_M[: -(-length // S)]
        # (M, KV, S, K) -> (1, length, KV, K)
        k, v = (
            x.index_select(0, used).transpose(1, 2).flatten(0, 1)[None, :length] for x in (cache.keys, cache.values)
        )
        out_HK.copy_(_dense(q_HK[None, None], k, v, causal=False)[0, 0])
    return out_NHK


@operations.decode_attention.register(Where.ANYWHERE, fits=_on_cpu)
def decode_attention_per_sequence(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, positions_N: Tensor, blocks_NM: Tensor, cache: PagedKV
) -> Tensor:
    """Write to the cache, then read sequence by sequence."""
    q_NHK = cache_new(q_NHK, k_NHK, v_NHK, positions_N, blocks_NM, cache)
    return paged_attention_per_sequence(q_NHK, cache, blocks_NM, positions_N + 1)


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
