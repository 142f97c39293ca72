"""Coefficients of Pillow's bicubic resampling of 8-bit images, on any device, bit for bit.

Y rows, X columns, H channels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

PRECISION = 22
"""Fractional bits of Pillow's integer coefficients for 8-bit images."""


@lru_cache(maxsize=256)
def bicubic_taps(source: int, target: int) -> tuple[Tensor, Tensor]:
    """Coefficients that make each of ``target`` pixels of a line from ``source`` pixels.

    The filter is Keys' cubic with a = -0.5, widened by the scale when a line gets shorter, truncated at the ends and
    normalised in float64, then rounded to integers, as in Pillow's ``Resample.c``.

    Returns:
        First pixels ``(target,)`` and weights ``(target, taps)``, int32 on the CPU; weights past the end are 0.
    """
    scale = source / target
    widen = max(scale, 1.0)
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    first = (centres - 2.0 * widen + 0.5).int().clamp(min=0)
    last = (centres + 2.0 * widen + 0.5).int().clamp(max=source)
    place = torch.arange(2 * math.ceil(2.0 * widen) + 1)
    x = ((place + first[:, None] - centres[:, None] + 0.5) * (1.0 / widen)).abs()
    near = ((1.5 * x - 2.5) * x) * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)).masked_fill(place >= (last - first)[:, None], 0.0)
    # One after the other, in Pillow's order: the last bit of a sum can decide a rounding.
    total = torch.zeros(target, dtype=torch.float64)
    for column in weights.unbind(1):
        total += column
    weights = weights / total[:, None] * (1 << PRECISION)
    return first, torch.where(weights < 0, weights - 0.5, weights + 0.5).int()


def taps_on(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same on a device, with weights ``(taps, target)``.

    Copied each time: a cached tensor could be freed on one stream while another still reads it.
    """
    first, weights = bicubic_taps(source, target)
    both = first, weights.t().contiguous()
    if device.type != "cuda":
        return both
    first, weights = (x.pin_memory().to(device, non_blocking=True) for x in both)
    return first, weights
