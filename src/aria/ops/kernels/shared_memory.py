"""Limits of shared memory: how much a program may use, and which loops fit.

Triton documents no formula for the shared memory of a loop. tests/engine/test_compiled_kernels.py checks the estimates
of kernels against compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from triton.runtime import driver

HOPPER = 227 << 10
"""Bytes per program on Hopper and data-center Blackwell; A100 has 163 KB, RTX cards have 99 KB."""
SPARE = 3 << 10
"""Bytes reserved for everything but the tiles of a loop."""


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use. The interpreter has no limit: the value of Hopper."""
    if device.type != "cuda":
        return HOPPER
    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


def stages_within(stages: int, step_bytes: int, device: torch.device) -> int:
    """``stages`` of a loop, or as many as fit.

    Args:
        stages: Wanted stages.
        step_bytes: Bytes of the tiles that one step loads.
        device: The GPU.
    """
    return min(stages, max(1, (shared_memory(device) - SPARE) // step_bytes))


class Loop(NamedTuple):
    """A loop over columns: columns of a step, and steps in flight."""

    block: int
    stages: int


def first_within(loops: Sequence[Loop], needs: Callable[[Loop], int], device: torch.device) -> Loop | None:
    """The first of the loops, fastest to smallest, whose ``needs`` fit into the shared memory of a program."""
    return next((loop for loop in loops if needs(loop) <= shared_memory(device)), None)
