"""Overlap of one launch with the next (programmatic dependent launch, Hopper and later).

A kernel launched with :func:`overlap` may start while the previous kernel in the stream still runs. What it does before
:func:`wait` must not depend on any other kernel: here it loads weights, which no kernel writes, and old keys. So memory
stays busy while the last programs of the previous kernel finish.
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
    """Let the next kernel of the stream start as soon as all programs of this one have reached this point.

    At the start of a kernel, the next one starts as soon as resources are free. That pays if its programs use so many
    registers that few fit on a multiprocessor. Small programs that start too early gather on the few multiprocessors
    that are free at that moment, where an even spread over all of them is faster: for those, release after the long
    loop (docs/lab/kernels.md).
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until all previous kernels are done and their writes are visible."""
    if PDL:
        gdc_wait()
