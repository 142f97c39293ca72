"""Overlap of one launch with the next (programmatic dependent launch, Hopper and later).

A kernel launched with :func:`overlap` may start while the kernel before it in the stream still runs. What it does ahead
of :func:`wait` must not depend on any other kernel: here it loads weights, which nobody writes, and old keys. So memory
stays busy while the last programs of the kernel before finish.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def _supported(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options that let a kernel start early: ``PDL`` for the kernel, ``launch_pdl`` for the launch."""
    if device.type != "cuda" or not _supported(torch.cuda.current_device() if device.index is None else device.index):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel of the stream start as soon as all programs of this one came here.

    What follows a kernel that comes here first is on its way as soon as there is room. That pays where a program holds
    so many registers that few fit on a processor. Small programs that come much too early settle where there is room
    just then, on a few processors, and the even spread over all of them is worth more: theirs belongs behind the long
    loop (docs/lab/kernels.md).
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Go on when every kernel before this one is done and what it wrote can be read."""
    if PDL:
        gdc_wait()
