"""Where keys and values live. The decoder hands over q, k and v unrotated and gets back what they attend to.

T tokens of all sequences end to end, N sequences, H heads, KV key/value heads, K head width, L layers, B blocks of the
cache, S tokens of a block, M blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aria import ops
from aria.config import TextConfig
from aria.ops import Segments


class Context(Protocol):
    """What the decoder asks of a place for keys and values."""

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Rotate q and k, remember k and v if there is a memory, and attend. Returns ``(T, H, K)``."""
        ...


class Packed:
    """Whole sequences at once and no memory: training, and scoring."""

    def __init__(self, config: TextConfig, segments: Segments):
        self._config = config
        self._segments = segments
        self._table: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        if self._table is None:
            # The angles serve all layers.
            positions, config = self._segments.positions(), self._config
            self._table = ops.rotary_table(positions, config.head_dim, config.rope_theta, q_THK.dtype)
        q_THK, k_THK = (ops.rotary(x, *self._table) for x in (q_THK, k_THK))
        return ops.attention(q_THK, k_THK, v_THK, self._segments, self._segments, causal=True)


class PagedCache:
    """Memory for keys and values in blocks of S tokens; which block is whose is the engine's business.

    Block 0 belongs to nobody: rows that only fill up a batch write there.
    """

    def __init__(
        self,
        config: TextConfig,
        blocks: int,
        block_size: int,
        max_positions: int,
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
        # Zeros, because what a mask hides must still be a number.
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device)
        """``(L, B, KV, S, K)`` each."""
        self.angles = ops.rope_angles(max_positions, config.head_dim, config.rope_theta, device)
        """float32 ``(positions, K)``."""

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class CachedChunk(NamedTuple):
    """Some tokens of one sequence's prompt."""

    length: int
    past: int
    """Tokens of the sequence that are in the cache already."""
    blocks: Tensor
    """int32 ``(M,)``, the sequence's blocks in order."""


@dataclass(frozen=True)
class Paged:
    """One step over a paged cache: first one new token of each of N sequences, then chunks of prompts."""

    cache: PagedCache
    positions: Tensor
    """int32 ``(T,)``: each token's place in its sequence."""
    blocks: Tensor
    """int32 ``(N, M)``: the blocks of the N sequences."""
    slots: Tensor | None = None
    """int32, ``block * S + offset`` of each token of the chunks."""
    chunks: Sequence[CachedChunk] = ()

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        keys, values, angles = self.cache.keys[layer], self.cache.values[layer], self.cache.angles
        N = self.blocks.shape[0]
        if not self.chunks:
            return ops.decode_attention(
                q_THK, k_THK, v_THK, self.positions, self.blocks, angles, keys, values
            )  # fmt: skip
        out = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
        if N:
            new = (q_THK[:N], k_THK[:N], v_THK[:N])
            out[:N] = ops.decode_attention(*new, self.positions[:N], self.blocks, angles, keys, values)
        assert self.slots is not None, "chunks need slots"
        q, k = ops.rotate_and_cache(
            q_THK[N:], k_THK[N:], v_THK[N:], self.positions[N:], self.slots, angles, keys, values
        )
        start = 0
        for chunk in self.chunks:
            own = slice(start, start + chunk.length)
            start += chunk.length
            out[N:][own] = ops.chunk_attention(
                q[own], k[own], v_THK[N:][own], keys, values, chunk.blocks, chunk.past
            )  # fmt: skip
        return out
