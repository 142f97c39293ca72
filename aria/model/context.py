"""Where keys and values live. The decoder hands over q, k and v unrotated and gets back what they attend to.

T tokens of all sequences end to end, N sequences, H heads, KV key/value heads, K head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aria import ops
from aria.config import TextConfig
from aria.ops import Segments


class Context(Protocol):
    """What the decoder asks of a place for keys and values."""

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Rotate q and k, remember k and v if there is a memory, and attend. Returns ``(T, H, K)``."""
        ...


class _Rotation:
    """Rotates by the tokens' positions; the angles are computed once and serve all layers."""

    def __init__(self, config: TextConfig, positions_T: Tensor):
        self._config = config
        self._positions = positions_T
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(self, q_THK: Tensor, k_THK: Tensor) -> tuple[Tensor, Tensor]:
        if self._table is None:
            self._table = ops.rotary_table(self._positions, self._config.head_dim, self._config.rope_theta, q_THK.dtype)
        return ops.rotary(q_THK, *self._table), ops.rotary(k_THK, *self._table)


class Packed:
    """Whole sequences at once and no memory: training, and scoring."""

    def __init__(self, config: TextConfig, segments: Segments):
        self._segments = segments
        self._rotate = _Rotation(config, segments.positions())

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        q_THK, k_THK = self._rotate(q_THK, k_THK)
        return ops.attention(q_THK, k_THK, v_THK, self._segments, self._segments, causal=True)


class Cached:
    """A memory of fixed room for N sequences: one call with the whole prompts, then one token of each a call.

    Sequence n's token at position t lies in slot t, however long the other sequences are.
    """

    def __init__(self, config: TextConfig, segments: Segments, room: int, dtype: torch.dtype, device: torch.device):
        """``segments`` are the prompts; ``room`` is the most tokens that any sequence may come to hold."""
        assert segments.longest <= room, f"prompts of {segments.longest} tokens in a cache of {room}"
        shape = (len(segments.lengths), room, config.num_key_value_heads, config.head_dim)
        self._config = config
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._prompts: Segments | None = segments
        self._lengths = segments.lengths
        self._row = torch.arange(len(segments.lengths), device=device).repeat_interleave(
            segments.cu_seqlens.diff(), output_size=segments.total
        )
        self._slot = segments.positions()
        self._rotate = _Rotation(config, self._slot)
        self._mask: Tensor | None = None

    def advance(self) -> None:
        """Make room for one more token of each sequence; the next call to the decoder brings those tokens."""
        device = self._slot.device
        self._prompts = None
        self._slot = torch.tensor(self._lengths, device=device)
        self._lengths = tuple(length + 1 for length in self._lengths)
        assert max(self._lengths) <= self._keys[0].shape[1], "the cache is full"
        self._row = torch.arange(len(self._lengths), device=device)
        self._rotate = _Rotation(self._config, self._slot)
        self._mask = torch.arange(max(self._lengths), device=device) <= self._slot[:, None]

    def select(self, rows: Sequence[int]) -> None:
        """Keep, repeat or drop sequences: afterwards sequence n is what sequence ``rows[n]`` was."""
        index = torch.tensor(rows, device=self._slot.device)
        self._keys = [keys[index] for keys in self._keys]
        self._values = [values[index] for values in self._values]
        self._lengths = tuple(self._lengths[row] for row in rows)

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        q_THK, k_THK = self._rotate(q_THK, k_THK)
        self._keys[layer][self._row, self._slot] = k_THK
        self._values[layer][self._row, self._slot] = v_THK
        if self._prompts is not None:
            return ops.attention(q_THK, k_THK, v_THK, self._prompts, self._prompts, causal=True)
        assert self._mask is not None
        keys, values = (cache[layer][:, : self._mask.shape[1]].transpose(1, 2) for cache in (self._keys, self._values))
        out = F.scaled_dot_product_attention(
            q_THK[:, :, None],
            keys,
            values,
            attn_mask=self._mask[:, None, None],
            enable_gqa=q_THK.shape[1] != k_THK.shape[1],
        )
        return out[:, :, 0]
