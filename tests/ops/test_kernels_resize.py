"""The resampling kernel against its reference, through Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

pytest.importorskip("triton")

from aria.ops import reference
from aria.ops.kernels import resize as kernels
from tests.helpers import interpreter  # noqa: F401  (fixes Triton's for current NumPy)


@pytest.mark.parametrize("shape", [(4, 9, 3), (2, 3, 7, 1, 3), (1, 1, 200, 3)])
@pytest.mark.parametrize("target", [1, 17, 100])
@pytest.mark.parametrize("dim", [-2, -3])
def test_bits_equal_the_reference(shape, target, dim):
    # Many extremes, so that sums leave 0..255 on both sides.
    images = torch.randint(-100, 400, shape).clamp(0, 255).to(torch.uint8)
    assert torch.equal(kernels.resample_triton(images, dim, target), reference.resample(images, dim, target))


def test_slices_of_images_work_too():
    images = torch.randint(0, 256, (2, 30, 40, 3), dtype=torch.uint8)[:, 3:20, 5:33]
    assert torch.equal(kernels.resample_triton(images, -2, 11), reference.resample(images, -2, 11))
