"""Fixed-shape views of packed streams for training: lengths stay on the device, nothing waits, nothing recompiles.

T tokens, P patches, C crops, H heads, KV key/value heads, K head width, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from aria import ops
from aria.config import TextConfig, VisionConfig
from aria.model.vision import PackedPatches, position_buckets
from aria.ops import Segments


@dataclass(frozen=True)
class BoundedSegments(Segments):
    """Segments whose lengths only the device knows; the host knows a bound. Varlen kernels ask for no more."""

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
    """Segments that start where ``cu_seqlens`` says, without reading it back.

    The CPU has no varlen kernel and no reason to avoid reading lengths, so there it is plain :class:`Segments`.

    Args:
        cu_seqlens: int ``(N + 1,)``, where each of N segments starts, and ``total`` at the end.
        bound: no segment is longer; kernels compute no further than this into one.
    """
    if cu_seqlens.device.type == "cpu":
        return Segments.of(cu_seqlens.diff().tolist())
    return BoundedSegments((), cu_seqlens.int(), bound=bound, size=total)


class TrainingContext:
    """:class:`aria.model.Packed` with its rotary table made up front, so that compiled layers change no state."""

    def __init__(self, config: TextConfig, segments: Segments, positions_T: Tensor, dtype: torch.dtype):
        self._segments = segments
        self._cos, self._sin = ops.rotary_table(positions_T, config.head_dim, config.rope_theta, dtype)

    def attend(self, layer: int, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        q_THK, k_THK = ops.rotary(q_THK, self._cos, self._sin), ops.rotary(k_THK, self._cos, self._sin)
        return ops.attention(q_THK, k_THK, v_THK, self._segments, self._segments, causal=True)


@dataclass(frozen=True)
class FixedPatches:
    """Crops of one size with every patch kept: each crop's real patches first, then its padding as a segment apart."""

    packed: PackedPatches
    """``(C x G x G, ...)`` patches in 2 C segments: real, padding, real, padding, ..."""
    order: Tensor
    """int64 ``(C, G x G)``: which patch of the grid, row by row, lies in each place."""
    rows: Tensor
    columns: Tensor
    """Real rows and columns of each crop."""


@lru_cache(maxsize=16)
def _bucket_table(grid: int, side: int, device: torch.device) -> Tensor:
    """``(G + 1, G)``: row n holds the position buckets of n real rows, zeros after them."""
    table = torch.zeros(grid + 1, grid, dtype=torch.long)
    for n in range(1, grid + 1):
        table[n, :n] = torch.tensor(position_buckets(n, side))
    return table.to(device)


def fixed_patches(pixels_C: Tensor, valid_C2: Tensor, config: VisionConfig) -> FixedPatches:
    """Cut crops into patches without waiting for the host; the arithmetic of :func:`aria.model.pack_patches`.

    Args:
        pixels_C: ``(C, channels, S, S)``.
        valid_C2: int64 ``(C, 2)``, real height and width of each crop in pixels, at least 1;
            padding lies right and below.
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
    patches = pixels_C.unflatten(2, (G, p)).unflatten(4, (G, p)).permute(0, 2, 4, 1, 3, 5).reshape(C * G * G, -1)
    real_C, start_C = rows * columns, torch.arange(C, device=device) * (G * G)
    cu_seqlens = nn.functional.pad(torch.stack((start_C, start_C + real_C), dim=1).flatten(), (0, 1), value=C * G * G)
    packed = PackedPatches(
        pixels=patches[(order + start_C[:, None]).flatten()],
        positions=positions.gather(1, order).flatten(),
        segments=bounded_segments(cu_seqlens, bound=G * G, total=C * G * G),
        grid_patches=(G * G,) * C,
    )
    return FixedPatches(packed, order, rows, columns)
