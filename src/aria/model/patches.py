"""Crops of whole grey levels -> patches for the vision encoder, without a look at the device.

P patches of all crops, C crops, S side of a crop in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from aria.config import VisionConfig
from aria.model.vision import PackedPatches, position_buckets
from aria.ops import Segments


def pack_crops(
    crops: Tensor,
    extents: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    config: VisionConfig,
    dtype: torch.dtype = torch.float32,
) -> PackedPatches:
    """Cut crops into patches, leave out those that are only padding, and normalise the rest.

    The same patches as :func:`aria.model.vision.pack_patches` makes of normalised crops and masks, but what is real is
    known on the host, so that nothing waits for the device.

    Args:
        crops: uint8 ``(C, 3, S, S)``, in any memory format.
        extents: (height, width) of the real pixels of each crop, from its upper left corner.
        mean, std: of each channel, for values in 0..1.
        dtype: of the patches.

    Raises:
        ValueError: sides that are no multiple of the patch size, or longer than the encoder knows.
    """
    C, channels, S, width = crops.shape
    p, side = config.patch_size, S // config.patch_size
    if side * p != S or width != S or side > config.patches_per_side:
        raise ValueError(
            f"crops of {S} x {width} pixels: they should be square, with sides that are multiples of {p}, at most "
            f"{config.image_size}"
        )
    assert len(extents) == C and channels == config.num_channels, "an extent for each crop, and known channels"
    assert all(0 < h <= S and 0 < w <= S for h, w in extents), "extents should lie inside the crops"
    found = [_real_patches(-(-h // p), -(-w // p), side, config.patches_per_side) for h, w in extents]
    lengths = [len(places) for places, _ in found]
    device = crops.device
    patches = crops.unflatten(3, (side, p)).unflatten(2, (side, p)).permute(0, 2, 4, 1, 3, 5).reshape(C * side**2, -1)
    if sum(lengths) < C * side**2:
        index = torch.cat([places + i * side**2 for i, (places, _) in enumerate(found)])
        patches = patches.index_select(0, _send(index, device))
    scale, shift = (_send(x, device) for x in _normalisation(tuple(mean), tuple(std), p**2))
    return PackedPatches(
        pixels=patches.float().div_(255).sub_(shift).div_(scale).to(dtype),
        positions=_send(torch.cat([positions for _, positions in found]), device),
        segments=Segments(tuple(lengths), _send(torch.tensor((0, *accumulate(lengths)), dtype=torch.int32), device)),
        grid_patches=(side**2,) * C,
    )


@lru_cache(maxsize=1024)
def _real_patches(rows: int, columns: int, side: int, per_side: int) -> tuple[Tensor, Tensor]:
    """Places in the grid of a crop of the patches with real pixels, and their rows of the position table."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    row_bucket = torch.tensor(position_buckets(rows, per_side))[:, None]
    column_bucket = torch.tensor(position_buckets(columns, per_side))
    return (row * side + column).flatten(), (row_bucket * per_side + column_bucket).flatten()


@lru_cache(maxsize=16)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], pixels: int) -> tuple[Tensor, Tensor]:
    """On the host."""
    scale, shift = (torch.tensor(values, dtype=torch.float32).repeat_interleave(pixels) for values in (std, mean))
    return scale, shift


def _send(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
