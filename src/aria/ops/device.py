"""The GPU on which work is launched, and whether it runs our kernels.

Triton launches kernels on the current device, and graphs, events and pinned memory belong to it, wherever their tensors
are. Every thread begins with the first GPU as its current one, so every public entry makes the model's GPU current.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


class OnDevice(Protocol):
    """An object that lives on one device."""

    @property
    def device(self) -> torch.device: ...


S = TypeVar("S", bound=OnDevice)

logger = logging.getLogger(__name__)

OLDEST = 8, 0
"""The lowest compute capability that kernels support. Every such GPU gives a program 99 KB of shared memory."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one within a block; no effect for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_own_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Decorate a method to run with its object's ``device`` as the current one."""

    @functools.wraps(method)
    def guarded(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with current(self.device):
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[S, P], R], guarded)


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of :mod:`aria.ops.kernels` run on a device: NVIDIA's Ampere or later, with Triton.

    Other GPUs run PyTorch's operations. The first call for one of them logs why.
    """
    return device.type == "cuda" and _has_kernels(device)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    reason = None
    if torch.version.hip is not None:
        reason = "it is not made by NVIDIA"
    elif (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        reason = "its compute capability is {}.{}, and they need {}.{}".format(*capability, *OLDEST)
    elif importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed (pip install triton)"
    if reason is not None:
        name = torch.cuda.get_device_name(device)
        logger.warning("Aria's kernels do not run on %s, %s: %s; PyTorch's operations do, slower", device, name, reason)
    return reason is None
