"""Steps that fail: what callers see of them, which lacked memory, and how their tensors are freed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aria.engine.core import Token
    from aria.engine.request import Request

_SIGNS = "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
"""In messages of PyTorch, CUDA and its libraries where they raise no class of their own."""


class StepError(RuntimeError):
    """A step failed for some of its requests. Others continue with the next one.

    Attributes:
        failed: requests that have ended without an answer, each with its reason.
        tokens: of the requests that were served.
    """

    def __init__(self, failed: dict[Request, Exception], tokens: list[Token]):
        super().__init__(str(next(iter(failed.values()))))
        self.failed = failed
        self.tokens = tokens


def failure(what: str, error: Exception) -> RuntimeError:
    """The exception a caller gets. A new one each time: two tasks must not raise the same exception."""
    told = RuntimeError(f"{what}: {error}")
    told.__cause__ = error
    return told


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, be it that this made something else fail, as the capture of a graph."""
    return any(
        isinstance(one, torch.OutOfMemoryError | MemoryError) or any(sign in str(one) for sign in _SIGNS)
        for one in _chain(error)
    )


def free_frames(error: BaseException) -> None:
    """Let go of the tensors of a failed step, which its traceback holds for as long as anybody holds the error."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    open_ones, seen = [error], set()
    while open_ones:
        one = open_ones.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            open_ones += [other for other in (one.__cause__, one.__context__) if other is not None]
