"""Packed streams of fixed shape: lengths stay on the device, without host synchronisation or recompilation.

T tokens, P patches, C crops, H heads, KV key/value heads, K head width, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from aria import ops
from aria.config import TextConfig, VisionConfig
from aria.model.patches import PackedPatches, cut_patches, position_buckets
from aria.ops import Segments


@dataclass(frozen=True)
class BoundedSegments(Segments):
    """Segments whose lengths only the device knows; variable-length kernels need just a bound on the host."""

    bound: int = 0
    size: int = 0

    @property
    def total(self) -> int:
        return self.size

    @property
    def longest(self) -> int:
        return self.bound

    @property
    def equal(self) -> bool:
        return False


def bounded_segments(cu_seqlens: Tensor, bound: int, total: int) -> Segments:
    """Make segments from ``cu_seqlens`` without reading it back to the host.

    The CPU has no variable-length kernel and no cost of reading lengths, so it gets plain :class:`Segments`.

    Args:
        cu_seqlens: int ``(N + 1,)``, starts of N segments, then ``total``.
        bound: Maximum length of a segment; kernels stop there.
        total: Sum of the lengths.
    """
    if cu_seqlens.device.type == "cpu":
        return Segments.of(cu_seqlens.diff().tolist())
    return BoundedSegments((), cu_seqlens.int(), bound=bound, size=total)


class TrainingContext:
    """Like :class:`aria.model.Packed`, with the rotary table precomputed so that compiled layers change no state."""

    def __init__(self, config: TextConfig, segments: Segments, positions_T: Tensor, dtype: torch.dtype):
        self._segments = segments
        self._cos, self._sin = ops.rotary_table(positions_T, config.head_dim, config.rope_theta, dtype)

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        q_THK, k_THK = ops.rotary(q_THK, self._cos, self._sin), ops.rotary(k_THK, self._cos, self._sin)
        return ops.attention(q_THK, k_THK, v_THK, self._segments, self._segments, causal=True)


@dataclass(frozen=True)
class FixedPatches:
    """Crops of one size with all patches: each crop's real patches first, then its padding as a separate segment."""

    packed: PackedPatches
    """``(C x G x G, ...)`` patches in 2 C segments: real, padding, real, padding, ..."""
    order: Tensor
    """int64 ``(C, G x G)``: row-major grid index of the patch at each place."""
    rows: Tensor
    columns: Tensor
    """Numbers of real rows and columns of each crop."""


@lru_cache(maxsize=16)
def _bucket_table(grid: int, side: int, device: torch.device) -> Tensor:
    """Return ``(G + 1, G)``: row n has the position buckets of n real rows, then zeros."""
    table = torch.zeros(grid + 1, grid, dtype=torch.long)
    for n in range(1, grid + 1):
        table[n, :n] = torch.tensor(position_buckets(n, side))
    return table.to(device)


def fixed_patches(pixels_C: Tensor, valid_C2: Tensor, config: VisionConfig) -> FixedPatches:
    """Cut crops into patches without host synchronisation, with the arithmetic of :func:`aria.model.pack_patches`.

    Args:
        pixels_C: Crops ``(C, channels, S, S)``.
        valid_C2: int64 ``(C, 2)``, real height and width of each crop in pixels, at least 1; padding is on the right
            and below.
        config: Configuration of the vision encoder.
    """
    p, side = config.patch_size, config.patches_per_side
    C, _, S, _ = pixels_C.shape
    G = S // p
    device = pixels_C.device
    table = _bucket_table(G, side, device)
    rows, columns = ((valid_C2 + p - 1) // p).unbind(1)
    place = torch.arange(G, device=device)
    real_CGG = (place < rows[:, None])[:, :, None] & (place < columns[:, None])[:, None, :]
    order = (~real_CGG).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    positions = (table[rows][:, :, None] * side + table[columns][:, None, :]).flatten(1)
    patches = cut_patches(pixels_C, p).flatten(0, 1)
    real_C, start_C = rows * columns, torch.arange(C, device=device) * (G * G)
    cu_seqlens = nn.functional.pad(torch.stack((start_C, start_C + real_C), dim=1).flatten(), (0, 1), value=C * G * G)
    packed = PackedPatches(
        pixels=patches[(order + start_C[:, None]).flatten()],
        positions=positions.gather(1, order).flatten(),
        segments=bounded_segments(cu_seqlens, bound=G * G, total=C * G * G),
        grid_patches=(G * G,) * C,
    )
    return FixedPatches(packed, order, rows, columns)
