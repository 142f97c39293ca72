"""The GPU that work is launched on.

Triton launches kernels on the current device, and graphs, events and pinned memory belong to it, wherever their tensors
are. Every thread begins with the first GPU as its current one. So what a program calls makes the model's GPU current:
these are the ways to say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class OnDevice(Protocol):
    """An object that lives on one device."""

    @property
    def device(self) -> torch.device: ...


S = TypeVar("S", bound=OnDevice)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one for a block; of no effect for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_own_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that runs with its object's ``device`` as the current one."""

    @functools.wraps(method)
    def guarded(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with current(self.device):
            return method(self, *args, **kwargs)

    return guarded
