"""Every operation in plain PyTorch: declaration, specification, and what runs where nothing faster fits.

T tokens, D hidden, H heads, KV key/value heads, K head width, E experts, A experts per token, F expert width,
O outputs of a linear layer, R rank of LoRA weights, N sequences, B blocks of the cache, S tokens of a block, M blocks
of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops.lora import LoRA
from aria.ops.multi_lora import MoEAdapters, MultiLoRA, mask_other_adapters
from aria.ops.resize import PRECISION, taps_on
from aria.ops.sampling import Settings, draw
from aria.ops.segments import Segments
from aria.ops.weights import Chunks, ExpertWeights, MoEWeights, PagedKV


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis: normalised in float32, cast back, then multiplied by the weight."""
    wide = x_TD.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x_TD.dtype)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, shift_D: Tensor | None = None) -> Tensor:
    """LayerNorm over the last axis of ``x + shift``; with a shift (float32) the sum is not rounded.

    Returns:
        ``(T, D)`` in the dtype of ``x_TD``.
    """
    if shift_D is None:
        return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps)
    normed = F.layer_norm(x_TD.float() + shift_D, weight_D.shape, weight_D.float(), bias_D.float(), eps)
    return normed.to(x_TD.dtype)


def linear_gelu(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """Linear, then GELU in its tanh form: ``(T, O)``."""
    return F.gelu(F.linear(x_TI, weight_OI, bias_O), approximate="tanh")


def norm_linear(x_TD: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> Tensor:
    """RMSNorm, then several linears side by side: ``(T, sum of O)``."""
    normed = rms_norm(x_TD, norm_D, eps)
    return torch.cat([F.linear(normed, weight) for weight in weights_OD], dim=-1)


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """``x W^T``."""
    return F.linear(x_TI, weight_OI)


def linear_add(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor) -> Tensor:
    """``residual + x @ weight.T``, ``(T, O)``."""
    return residual_TO + F.linear(x_TI, weight_OI)


def rotary_table(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(T, K)`` of the half-split rotary convention, computed in float32 and cast to ``dtype``."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles = positions_T.float()[:, None] * (1.0 / theta**exponents)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate each pair (k, k + K/2) of every head by its token's angle."""
    low, high = x_THK.chunk(2, dim=-1)
    return x_THK * cos_TK[:, None, :] + torch.cat((-high, low), dim=-1) * sin_TK[:, None, :]


def attention(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, *, causal: bool
) -> Tensor:
    """Attention within each segment; scale K^-0.5, softmax in float32.

    Args:
        q_THK: Queries ``(T, H, K)``, segment after segment.
        k_SHK, v_SHK: Keys and values ``(S, KV, K)``; KV divides H (grouped queries).
        queries, keys: Lengths of the segments of queries and of keys, the same number of each.
        causal: Query i of a segment sees the keys up to ``i + len(keys) - len(queries)``.

    Returns:
        ``(T, H, K)`` in the dtype of ``q_THK``.
    """
    assert len(queries.lengths) == len(keys.lengths), "queries and keys have different numbers of segments"
    groups = q_THK.shape[1] // k_SHK.shape[1]
    outputs = []
    pieces = zip(q_THK.split(queries.lengths), k_SHK.split(keys.lengths), v_SHK.split(keys.lengths), strict=True)
    for q, k, v in pieces:
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhk,shk->hqs", q, k) * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
            scores = scores.masked_fill(later, float("-inf"))
        outputs.append(torch.einsum("hqs,shk->qhk", scores.softmax(-1, dtype=torch.float32).to(q.dtype), v))
    return torch.cat(outputs)


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts by their logits, then weight the chosen ones by a softmax over them alone, in float32.

    Returns:
        Weights ``(T, A)`` in the dtype of the logits, expert indices ``(T, A)`` int64.
    """
    chosen, index = logits_TE.topk(top_k, dim=-1)
    return chosen.softmax(-1, dtype=torch.float32).to(logits_TE.dtype), index


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last axis, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate_TF) * up_TF


def lora_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, lora: LoRA) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T``, ``(T, O)`` in the dtype of ``x_TI``."""
    a, b, scaling, dropout = lora.to(x_TI)
    narrow_TR = F.linear(F.dropout(x_TI, dropout) if dropout else x_TI, a) * scaling
    y_TO = F.linear(x_TI, weight_OI, bias_O)
    return torch.addmm(y_TO, narrow_TR, b.t()) if x_TI.ndim == 2 else y_TO + F.linear(narrow_TR, b)


def lora_linears(
    x_TI: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], loras: Sequence[LoRA]
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` of several weights and biases on one input; their dropout may be the same."""
    pairs = zip(layers, loras, strict=True)
    return tuple(lora_linear(x_TI, weight, bias, lora) for (weight, bias), lora in pairs)


def expert_linear(x_TI: Tensor, weight_IO: Tensor, lora: LoRA | None, expert: int) -> Tensor:
    """One expert's product, plus its LoRA term if there is one."""
    y_TO = x_TI @ weight_IO
    if lora is None:
        return y_TO
    a_IR, b_RO = lora.a[expert].to(x_TI.dtype), lora.b[expert].to(x_TI.dtype)
    dropped = F.dropout(x_TI, lora.dropout) if lora.dropout else x_TI
    return torch.addmm(y_TO, dropped @ a_IR * lora.scaling, b_RO)


def expert_mlp(
    x_TD: Tensor, experts: ExpertWeights, weights_TA: Tensor, index_TA: Tensor, *, present: int | None = None
) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLU outputs; no capacity limit, no token dropped.

    Args:
        x_TD: Tokens.
        experts: Weights of the experts, with LoRA weights or without; dropout is drawn separately for each token and
            each of its experts.
        weights_TA, index_TA: From :func:`route`.
        present: How many of the choices are of these experts, at least 1; the others have the index E, stand for
            experts on other ranks, and add nothing. None: all.
    """
    fc1_EDF, fc2_EFD, fc1_lora, fc2_lora = experts
    out = torch.zeros_like(x_TD)
    for expert in index_TA[index_TA < len(fc1_EDF)].unique().tolist():
        token, place = torch.where(index_TA == expert)
        hidden = swiglu(expert_linear(x_TD[token], fc1_EDF[expert], fc1_lora, expert))
        y = expert_linear(hidden, fc2_EFD[expert], fc2_lora, expert)
        out.index_add_(0, token, y * weights_TA[token, place, None])
    return out


def moe_layer(x_TD: Tensor, weights: MoEWeights, adapters: MoEAdapters | None = None) -> Tensor:
    """The second half of a decoder layer: RMSNorm, router, routed and shared experts, residual.

    Args:
        x_TD: The residual stream, before the norm.
        weights: All weights of this half of the layer.
        adapters: LoRA weights of several adapters, and each token's adapter id. None: the base model alone.
    """
    gate, up, down = weights.shared
    normed = rms_norm(x_TD, weights.norm, weights.eps)
    weights_TA, index_TA = route(F.linear(normed, weights.router), weights.top_k)
    if adapters is None:
        routed = expert_mlp(normed, weights.experts, weights_TA, index_TA)
        return x_TD + routed + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
    routed = multi_lora_expert_mlp(normed, weights.experts, weights_TA, index_TA, adapters)
    gate_up = torch.cat((F.linear(normed, gate), F.linear(normed, up)), dim=-1)
    if adapters.gate_up is not None:
        gate_up = multi_lora_linear_add(gate_up, normed, adapters.gate_up, adapters.adapter_ids)
    hidden = swiglu(gate_up)
    out = routed + F.linear(hidden, down)
    if adapters.down is not None:
        out = multi_lora_linear_add(out, hidden, adapters.down, adapters.adapter_ids)
    return x_TD + out


def multi_lora_linear_add(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA, adapter_ids_T: Tensor) -> Tensor:
    """``y`` plus the product of ``x`` with each token's own LoRA weights, ``(T, O)``.

    Args:
        y_TO: The output of the linear layer, perhaps with a residual.
        x_TI: The input of the linear layer.
        lora: LoRA weights of all adapters.
        adapter_ids_T: int32, each token's adapter id; 0 is the base model.
    """
    return torch.addmm(y_TO, mask_other_adapters(F.linear(x_TI, lora.a), lora, adapter_ids_T), lora.b.t())


def multi_lora_expert_mlp(
    x_TD: Tensor, experts: ExpertWeights, weights_TA: Tensor, index_TA: Tensor, adapters: MoEAdapters
) -> Tensor:
    """:func:`expert_mlp` in which each token has its own LoRA weights for ``fc1`` and ``fc2``.

    Args:
        x_TD, weights_TA, index_TA: See :func:`expert_mlp`.
        experts: Weights of the experts, without LoRA weights.
        adapters: LoRA weights of all adapters, and each token's adapter id.
    """

    def product(x: Tensor, weight_EIO: Tensor, lora: MultiLoRA | None, ids: Tensor, expert: int) -> Tensor:
        y = x @ weight_EIO[expert]
        return y if lora is None else y + mask_other_adapters(x @ lora.a[expert], lora, ids) @ lora.b[expert]

    out = torch.zeros_like(x_TD)
    for expert in index_TA.unique().tolist():
        token, place = torch.where(index_TA == expert)
        ids = adapters.adapter_ids[token]
        hidden = swiglu(product(x_TD[token], experts.fc1, adapters.fc1, ids, expert))
        y = product(hidden, experts.fc2, adapters.fc2, ids, expert)
        out.index_add_(0, token, y * weights_TA[token, place, None])
    return out


def rope_angles(length: int, head_dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """float32 ``(length, K)``: cosines of the K / 2 angles of each position, then their sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * (1.0 / theta**exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotate_and_cache(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, positions_T: Tensor, slots_T: Tensor, cache: PagedKV
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions and write k and v into their slots of the paged cache.

    Args:
        q_THK, k_THK, v_THK: ``(T, H, K)``, ``(T, KV, K)`` twice; views of one fused projection, rows may be strided.
        positions_T: int32.
        slots_T: int32; token t goes to offset ``slot % S`` of block ``slot // S``. No two are equal, except in block 0,
            which holds what nobody reads.
        cache: One layer's cache; changed in place.

    Returns:
        The rotated q ``(T, H, K)`` and k ``(T, KV, K)``, contiguous.
    """
    cos, sin = cache.angles[positions_T.long()].to(torch.float32).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    q_THK, k_THK = (rotary(x.float(), cos, sin).to(x.dtype) for x in (q_THK, k_THK))
    S = cache.keys.shape[2]
    block, offset = slots_T.long() // S, slots_T.long() % S
    cache.keys[block, :, offset] = k_THK
    cache.values[block, :, offset] = v_THK
    return q_THK, k_THK


def paged_attention(q_NHK: Tensor, cache: PagedKV, blocks_NM: Tensor, lengths_N: Tensor) -> Tensor:
    """One query of each sequence against all its cached keys; softmax in float32.

    Args:
        q_NHK: Rotated queries.
        cache: One layer's cache.
        blocks_NM: int32, the block table; entries past a sequence's length are any valid block.
        lengths_N: int32, keys of each sequence, including the query's own.

    Returns:
        ``(N, H, K)``.
    """
    N, M = blocks_NM.shape
    KV, S = cache.keys.shape[1:3]
    # (N, M, KV, S, K) -> (N, KV, M * S, K)
    keys, values = (x[blocks_NM.long()].transpose(1, 2).reshape(N, KV, M * S, -1) for x in (cache.keys, cache.values))
    mask = torch.arange(M * S, device=q_NHK.device) < lengths_N[:, None]
    # Freed blocks keep what their last owner wrote, and zero times a NaN would be NaN.
    past = ~mask[:, None, :, None]
    for gathered in (keys, values):
        gathered.masked_fill_(past, 0)
    out = F.scaled_dot_product_attention(
        q_NHK[:, :, None], keys, values, attn_mask=mask[:, None, None], enable_gqa=q_NHK.shape[1] != KV
    )
    return out[:, :, 0]


def cache_new(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, positions_N: Tensor, blocks_NM: Tensor, cache: PagedKV
) -> Tensor:
    """The first half of :func:`decode_attention`: rotate q and k, write k and v at ``positions``; the rotated q."""
    S = cache.keys.shape[2]
    block = blocks_NM.gather(1, (positions_N.long() // S)[:, None])[:, 0]
    q_NHK, _ = rotate_and_cache(q_NHK, k_NHK, v_NHK, positions_N, block * S + positions_N % S, cache)
    return q_NHK


def decode_attention(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, positions_N: Tensor, blocks_NM: Tensor, cache: PagedKV
) -> Tensor:
    """One new token of each sequence: rotate q and k, write k and v at ``positions``, attend to all up to there.

    The arguments are those of :func:`rotate_and_cache` and :func:`paged_attention`. Rows that only pad a batch have
    position 0 and block 0.

    Returns:
        ``(N, H, K)``.
    """
    q_NHK = cache_new(q_NHK, k_NHK, v_NHK, positions_N, blocks_NM, cache)
    return paged_attention(q_NHK, cache, blocks_NM, positions_N + 1)


def chunk_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cache: PagedKV, blocks_M: Tensor, past: int) -> Tensor:
    """A chunk of one sequence's prompt: each token sees the cached past and the chunk up to itself.

    Args:
        q_THK, k_THK, v_THK: The chunk, rotated; its keys and values are already in the cache too.
        cache: One layer's cache.
        blocks_M: int32, the sequence's blocks in order.
        past: Tokens of the sequence before the chunk.

    Returns:
        ``(T, H, K)``.
    """
    KV, S, K = cache.keys.shape[1:]
    used = blocks_M[: -(-past // S)].long()
    old_k, old_v = (x[used].transpose(1, 2).reshape(-1, KV, K)[:past] for x in (cache.keys, cache.values))
    keys, values = torch.cat((old_k, k_THK)), torch.cat((old_v, v_THK))
    queries, all_keys = Segments.of([q_THK.shape[0]]), Segments.of([keys.shape[0]])
    return attention(q_THK, keys, values, queries, all_keys, causal=True)


def chunks_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cache: PagedKV, chunks: Chunks) -> Tensor:
    """Chunks of N prompts, end to end: :func:`chunk_attention` of each."""
    assert chunks.pasts is not None, "no kernel reads the spans of these chunks"
    lengths = list(chunks.lengths)
    parts = zip(*(x.split(lengths) for x in (q_THK, k_THK, v_THK)), chunks.blocks, chunks.pasts, strict=True)
    return torch.cat([chunk_attention(q, k, v, cache, blocks, past) for q, k, v, blocks, past in parts])


def sample(
    logits_NV: Tensor,
    rows_N: Tensor,
    positions_N: Tensor,
    table_RC: Tensor,
    banned: Tensor,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Draw a token for each sequence.

    Temperature comes first, then the ``top_k`` likeliest, then the smallest set that holds ``top_p`` of what is left,
    then those of at least ``min_p`` times the likeliest. Logits equal to the last one kept are kept too. V vocabulary,
    R rows of the table.

    Args:
        logits_NV: Any floating dtype; not changed.
        rows_N: int32, each sequence's row of the table.
        positions_N: int32, each token's position in its sequence.
        table_RC: int32, see :class:`aria.ops.sampling.Settings`.
        banned: int64, ids that are never drawn.
        arrivals: int32 counters of the kernel's programs, N or more, as in :class:`PagedKV`.

    Returns:
        int64 ``(N,)``.
    """
    logits = logits_NV.float().index_fill(-1, banned, float("-inf"))
    settings = Settings.of(table_RC.index_select(0, rows_N))
    warm = (settings.temperature > 0).nonzero()[:, 0]
    if not len(warm):
        return logits.argmax(-1)
    if len(warm) == len(logits):
        return draw(logits, positions_N, settings)
    tokens = logits.argmax(-1)
    tokens[warm] = draw(logits[warm], positions_N[warm], Settings(*(column[warm] for column in settings)))
    return tokens


def resample(images_YXH: Tensor, dim: int, target: int) -> Tensor:
    """Resize one axis of images: one of the two passes of ``PIL.Image.resize`` with BICUBIC, bit for bit.

    Args:
        images_YXH: uint8 ``(..., Y, X, channels)``.
        dim: -3 changes Y, -2 changes X.
        target: The new length.
    """
    assert images_YXH.dtype == torch.uint8, f"images are {images_YXH.dtype}, not uint8"
    source = images_YXH.shape[dim]
    first, weights = taps_on(source, target, images_YXH.device)
    shape = [1] * images_YXH.ndim
    shape[dim] = target
    total: Tensor | None = None
    for tap, weight in enumerate(weights):
        weighted = images_YXH.index_select(dim, (first + tap).clamp(max=source - 1)) * weight.view(shape)
        total = weighted if total is None else total.add_(weighted)
    assert total is not None, "every pixel has taps"
    return total.add_(1 << (PRECISION - 1)).bitwise_right_shift_(PRECISION).clamp_(0, 255).to(torch.uint8)
