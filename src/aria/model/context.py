"""Where keys and values live. The decoder passes q, k and v unrotated and gets the attention output back.

T tokens of all sequences end to end, N sequences, H heads, KV key/value heads, K head width, L layers, B blocks of the
KV cache, S tokens of a block, M blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aria import ops
from aria.config import TextConfig
from aria.model.multi_lora import AdapterBatch
from aria.ops import Chunks, PagedKV, Segments


class Context(Protocol):
    """What the decoder needs of a store for keys and values."""

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Rotate q and k, store k and v if there is a cache, and attend. Returns ``(T, H, K)``."""
        ...


class Packed:
    """Whole sequences without a cache: training and scoring."""

    def __init__(self, config: TextConfig, segments: Segments):
        self._config = config
        self._segments = segments
        self._table: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        if self._table is None:
            # The angles are the same for all layers.
            positions, config = self._segments.positions(), self._config
            self._table = ops.rotary_table(positions, config.head_dim, config.rope_theta, q_THK.dtype)
        q_THK, k_THK = (ops.rotary(x, *self._table) for x in (q_THK, k_THK))
        return ops.attention(q_THK, k_THK, v_THK, self._segments, self._segments, causal=True)


class PagedCache:
    """Memory of the KV cache, in blocks of S tokens; the engine decides which sequence has which block.

    Block 0 belongs to no sequence: rows that only pad a batch write there.

    Args:
        config: Configuration of the decoder.
        blocks: B.
        block_size: S.
        max_positions: Tokens of the longest sequence.
        max_sequences: Maximum number of sequences that decode one token each in a step.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        config: TextConfig,
        blocks: int,
        block_size: int,
        max_positions: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (
            2,
            config.num_hidden_layers,
            blocks,
            config.num_key_value_heads,
            block_size,
            config.head_dim,
        )
        # Zeros, because masked values must still be finite.
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device)
        """``(L, B, KV, S, K)`` each."""
        self.angles = ops.rope_angles(max_positions, config.head_dim, config.rope_theta, device)
        """float32 ``(positions, K)``."""
        self.arrivals = torch.zeros(max_sequences * config.num_attention_heads, dtype=torch.int32, device=device)
        """Counters of the kernels for decoding; between launches they are zeros. Each cache has its own, because
        engines on different streams run at the same time."""
        self.layers = tuple(
            PagedKV(self.keys[layer], self.values[layer], self.angles, self.arrivals)
            for layer in range(config.num_hidden_layers)
        )
        """The cache of each layer, as operations take it."""

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Paged:
    """One step over a paged cache: first one new token of each of N sequences, then chunks of prompts.

    Of a chunk's tokens at most the last is sampled from. A step with chunks says which tokens those are, so that the
    last layer can drop the others.
    """

    cache: PagedCache
    positions: Tensor
    """int32 ``(T,)``: each token's position in its sequence."""
    blocks: Tensor
    """int32 ``(N, M)``: the block table of the N sequences."""
    slots: Tensor | None = None
    """int32 ``(T,)``, ``block * S + offset`` of each token; None without chunks."""
    chunk_blocks: Tensor | None = None
    """int32 ``(C, M)``: the block table of the sequences of the C chunks."""
    chunk_lengths: Sequence[int] = ()
    chunk_pasts: Sequence[int] | None = ()
    """Tokens of each of those sequences that are already cached; None in a CUDA graph, where ``spans`` have them."""
    spans: Tensor | None = None
    """int32 ``(C, 3)``: first token of each chunk, counted among those of all chunks, its length and its past."""
    sampled: Tensor | None = None
    """int32 ``(R,)``: indices of the tokens that are sampled from; None means all."""
    sampled_blocks: Tensor | None = None
    """int32 ``(R, M)``: the block table of their sequences."""
    sampled_lengths: Tensor | None = None
    """int32 ``(R,)``: tokens of their sequences up to and including them."""
    adapters: AdapterBatch | None = None
    """LoRA weights and each token's adapter id; None if no token has an adapter."""

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        cache = self.cache.layers[layer]
        N = self.blocks.shape[0]
        new, read = (q_THK[:N], k_THK[:N], v_THK[:N]), (q_THK[N:], k_THK[N:], v_THK[N:])
        if not self.chunk_lengths:
            return ops.decode_attention(*new, self.positions, self.blocks, cache)
        assert self.slots is not None and self.chunk_blocks is not None, "chunks need slots and blocks"
        # All chunks are written before any is read: one may begin with blocks that another fills.
        q, k = ops.rotate_and_cache(*read, self.positions[N:], self.slots[N:], cache)
        chunks = Chunks(self.chunk_blocks, self.chunk_lengths, self.chunk_pasts, self.spans)
        out = ops.chunks_attention(q, k, read[2], cache, chunks)
        if not N:
            return out
        return torch.cat((ops.decode_attention(*new, self.positions[:N], self.blocks, cache), out))

    def attend_sampled(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Store keys and values of all tokens, but attend only from those that are sampled from: ``(R, H, K)``."""
        assert self.sampled is not None and self.slots is not None, (
            "the step does not say which tokens are sampled from"
        )
        assert self.sampled_blocks is not None and self.sampled_lengths is not None, (
            "the step has no block table for them"
        )
        cache = self.cache.layers[layer]
        q_THK, _ = ops.rotate_and_cache(q_THK, k_THK, v_THK, self.positions, self.slots, cache)
        q_RHK = q_THK.index_select(0, self.sampled)
        if not len(q_RHK):
            return q_RHK
        return ops.paged_attention(q_RHK, cache, self.sampled_blocks, self.sampled_lengths)
