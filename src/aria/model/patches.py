"""Crops -> packed patches for the vision encoder: one packer, which knows on the host what is real and what is padding.

P patches of all crops end to end, C crops, S side of a crop in pixels, G patches of a crop with its padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from aria.config import VisionConfig
from aria.ops import Segments


@dataclass(frozen=True)
class PackedPatches:
    """The real patches of some crops, row by row, crop after crop."""

    pixels: Tensor
    """``(P, channels * patch * patch)``."""
    positions: Tensor
    """int64 ``(P,)``: rows of the learned position table."""
    segments: Segments
    """Real patches of each crop."""
    grid_patches: tuple[int, ...]
    """G of each crop, which decides how many queries the projector uses for it."""


@lru_cache(maxsize=1024)
def position_buckets(patches: int, per_side: int) -> tuple[int, ...]:
    """Which of ``per_side`` learned rows stands for each of ``patches`` rows that cover the same extent.

    Ideally ``per_side * i // patches``; the weights were trained with float32 fractions against float32
    boundaries, which fall one short in a few places (25, 49, 50 and 55 patches of 70), and so this computes in float32.
    """
    boundaries = torch.arange(1 / per_side, 1.0, 1 / per_side)
    fractions = torch.arange(patches, dtype=torch.float32) * (1.0 / torch.tensor(patches))
    return tuple(torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True).tolist())


def cut_patches(crops: Tensor, patch_size: int) -> Tensor:
    """Crops ``(C, channels, height, width)`` -> all their patches ``(C, G, channels * patch * patch)``, row by row."""
    p = patch_size
    return crops.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pack_patches(pixel_values: Tensor, pixel_mask: Tensor | None, config: VisionConfig) -> PackedPatches:
    """Cut normalised crops into patches and keep those in which any pixel is real.

    Args:
        pixel_values: ``(C, channels, S, S)``.
        pixel_mask: bool ``(C, S, S)``, True on real pixels; None means all are.
        config: Configuration of the vision encoder.

    Raises:
        ValueError: The shapes do not fit each other or the patch size, or a crop has no real pixel.
    """
    p, per_side = config.patch_size, config.patches_per_side
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values should be (crops, {config.num_channels}, S, S), but is {tuple(pixel_values.shape)}"
        )
    C, _, height, width = pixel_values.shape
    rows, columns = height // p, width // p
    if rows * p != height or columns * p != width or max(rows, columns) > per_side:
        raise ValueError(
            f"crops of {height} x {width} pixels: sides should be multiples of {p}, at most {config.image_size}"
        )
    if pixel_mask is None:
        mask = torch.ones(C, rows, columns, dtype=torch.bool)
    else:
        if pixel_mask.shape != (C, height, width):
            raise ValueError(
                f"pixel_mask should be {(C, height, width)} as pixel_values, but is {tuple(pixel_mask.shape)}"
            )
        mask = pixel_mask.bool().view(C, rows, p, columns, p).any(4).any(2).cpu()
    real = [_real_by_mask(crop, per_side) for crop in mask]
    for crop, (places, _) in enumerate(real):
        if not len(places):
            raise ValueError(f"crop {crop} has no real pixel; every crop needs at least one")
    return _pack(pixel_values, real, p)


def pack_crops(
    crops: Tensor,
    extents: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    config: VisionConfig,
    dtype: torch.dtype = torch.float32,
) -> PackedPatches:
    """Cut 8-bit crops into patches, leave out those that are only padding, and normalise the rest.

    The same patches as :func:`pack_patches` makes of normalised crops and masks, without reading the device.

    Args:
        crops: uint8 ``(C, channels, S, S)``, in any memory format.
        extents: (height, width) of the real pixels of each crop, from its upper left corner.
        mean, std: Of each channel, for values in 0..1.
        config: Configuration of the vision encoder.
        dtype: Of the patches.

    Raises:
        ValueError: Sides are not multiples of the patch size, or longer than the encoder allows.
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
    real = [_real_by_extent(-(-h // p), -(-w // p), side, config.patches_per_side) for h, w in extents]
    packed = _pack(crops, real, p)
    scale, shift = (_send(x, crops.device) for x in _normalisation(tuple(mean), tuple(std), p**2))
    return replace(packed, pixels=packed.pixels.float().div_(255).sub_(shift).div_(scale).to(dtype))


def _pack(crops: Tensor, real: Sequence[tuple[Tensor, Tensor]], patch_size: int) -> PackedPatches:
    """Cut crops and keep their real patches.

    Args:
        crops: ``(C, channels, height, width)`` on any device.
        real: Of each crop, on the host: places of the real patches in its grid, and their rows of the position table.
        patch_size: Pixels of a side.
    """
    device, patches = crops.device, cut_patches(crops, patch_size)
    C, G = patches.shape[:2]
    patches, lengths = patches.flatten(0, 1), [len(places) for places, _ in real]
    if sum(lengths) < C * G:
        index = torch.cat([places + crop * G for crop, (places, _) in enumerate(real)])
        patches = patches.index_select(0, _send(index, device))
    return PackedPatches(
        pixels=patches,
        positions=_send(torch.cat([positions for _, positions in real]), device),
        segments=Segments(tuple(lengths), _send(torch.tensor((0, *accumulate(lengths)), dtype=torch.int32), device)),
        grid_patches=(G,) * C,
    )


def _real_by_mask(mask: Tensor, per_side: int) -> tuple[Tensor, Tensor]:
    """Places in the grid of a crop of the real patches, and their rows of the position table.

    Args:
        mask: bool ``(rows, columns)`` on the host, True on real patches.
        per_side: Rows and columns of the position table.
    """
    # The extent is read off the first column and the first row, as the authors' encoder does.
    row, column = (
        torch.tensor((*position_buckets(max(real, 1), per_side)[:real], *(per_side - 1,) * (size - real)))
        for size, real in zip(mask.shape, (int(mask[:, 0].sum()), int(mask[0].sum())), strict=True)
    )
    return mask.flatten().nonzero()[:, 0], (row[:, None] * per_side + column)[mask]


@lru_cache(maxsize=1024)
def _real_by_extent(rows: int, columns: int, side: int, per_side: int) -> tuple[Tensor, Tensor]:
    """The same for real patches in the upper left corner of a square grid."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[:rows, :columns] = True
    return _real_by_mask(mask, per_side)


@lru_cache(maxsize=16)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], pixels: int) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of each value of a patch, on the host."""
    scale, shift = (torch.tensor(values, dtype=torch.float32).repeat_interleave(pixels) for values in (std, mean))
    return scale, shift


def _send(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
