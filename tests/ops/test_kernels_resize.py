"""The resampling kernel against its PyTorch twin, through Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

pytest.importorskip("triton")

from aria.ops import reference
from aria.ops.kernels import resize as kernels
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's for today's NumPy)


@pytest.mark.parametrize("shape", [(4, 9, 3), (2, 3, 7, 1, 3), (1, 1, 200, 3)])
@pytest.mark.parametrize("target", [1, 17, 100])
@pytest.mark.parametrize("dim", [-2, -3])
def test_bits_are_those_of_the_twin(shape, target, dim):
    # The extremes most of all, where sums leave 0..255 on both sides.
    pictures = torch.randint(-100, 400, shape).clamp(0, 255).to(torch.uint8)
    assert torch.equal(kernels.resample_triton(pictures, dim, target), reference.resample(pictures, dim, target))


def test_slices_of_pictures_are_taken_too():
    pictures = torch.randint(0, 256, (2, 30, 40, 3), dtype=torch.uint8)[:, 3:20, 5:33]
    assert torch.equal(kernels.resample_triton(pictures, -2, 11), reference.resample(pictures, -2, 11))
