"""Resizing one axis of 8-bit images with Pillow's integers: every output is one thread's short sum.

A: product of the axes before the resized one; B: bytes after it (a pixel's channels, or a whole row).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.registry import Where
from aria.ops.resize import PRECISION, taps_on

BLOCK = 1024


# No variants for sizes that happen to be 1 or multiples of 16: each would be compiled when such an image comes.
@triton.jit(do_not_specialize=["source", "target", "B", "taps"])
def _resample_kernel(
    images, first, weights, out, source, target, B, taps,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < target * B
    place, byte = index // B, index % B
    start = tl.load(first + place, mask=inside, other=0)
    line = images + a * source * B
    total = tl.full([BLOCK], 1 << (PRECISION - 1), tl.int32)
    for tap in range(taps):
        at = start + tap
        pixels = tl.load(line + at * B + byte, mask=inside & (at < source), other=0).to(tl.int32)
        total += pixels * tl.load(weights + tap * target + place, mask=inside, other=0)
    grey = tl.minimum(tl.maximum(total >> PRECISION, 0), 255)
    tl.store(out + a * target * B + index, grey.to(tl.uint8), mask=inside)


@operations.resample.register(Where.GPU)
def resample_triton(images_YXH: Tensor, dim: int, target: int) -> Tensor:
    """One launch; every output is one thread's sum."""
    assert images_YXH.dtype == torch.uint8, f"images are {images_YXH.dtype}, not uint8"
    dim %= images_YXH.ndim
    images_YXH = images_YXH.contiguous()
    shape, source = list(images_YXH.shape), images_YXH.shape[dim]
    first, weights = taps_on(source, target, images_YXH.device)
    B = images_YXH[(0,) * (dim + 1)].numel()
    A = images_YXH.numel() // (source * B)
    out = torch.empty([*shape[:dim], target, *shape[dim + 1 :]], dtype=torch.uint8, device=images_YXH.device)
    _resample_kernel[(A, triton.cdiv(target * B, BLOCK))](
        images_YXH, first, weights, out, source, target, B, len(weights), PRECISION=PRECISION, BLOCK=BLOCK
    )
    return out
