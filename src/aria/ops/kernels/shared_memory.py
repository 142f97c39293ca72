"""Shared memory: how much of it a program may have, and which loops fit into it.

Triton documents no formula for the shared memory of a loop. The estimates that kernels make are checked against
compiled kernels by tests/engine/test_compiled_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from triton.runtime import driver

HOPPER = 227 << 10
"""Of a program on Hopper and on data-center Blackwell; A100 has 163 KB, RTX cards have 99 KB."""
SPARE = 3 << 10
"""Left for what a program needs beside the tiles of its loop."""


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have. Of the interpreter, which has no limit: as on Hopper."""
    if device.type != "cuda":
        return HOPPER
    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


def stages_within(stages: int, step_bytes: int, device: torch.device) -> int:
    """``stages`` of a loop, or as many as fit.

    Args:
        step_bytes: of the tiles that one step loads.
    """
    return min(stages, max(1, (shared_memory(device) - SPARE) // step_bytes))


class Loop(NamedTuple):
    """A loop over columns: of one step, and steps under way at once."""

    block: int
    stages: int


def first_within(loops: Sequence[Loop], needs: Callable[[Loop], int], device: torch.device) -> Loop | None:
    """The first of the loops, fastest to smallest, that takes no more bytes than a program may have."""
    return next((loop for loop in loops if needs(loop) <= shared_memory(device)), None)
