"""Failed steps: the exceptions that callers get, out-of-memory detection, and freeing the tensors of a failed step."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aria.engine.core import Token
    from aria.engine.request import Request

_SIGNS = "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
"""Parts of messages of PyTorch, CUDA and its libraries that mean a lack of memory."""


class StepError(RuntimeError):
    """A step failed for some of its requests. The others continue with the next step.

    Attributes:
        failed: Requests that ended without an answer, each with its error.
        tokens: Tokens of the requests that were served.
    """

    def __init__(self, failed: dict[Request, Exception], tokens: list[Token]):
        super().__init__(str(next(iter(failed.values()))))
        self.failed = failed
        self.tokens = tokens


def failure(what: str, error: Exception) -> RuntimeError:
    """Make the exception that a caller gets: a new one each time, because two tasks must not raise the same one."""
    failed = RuntimeError(f"{what}: {error}")
    failed.__cause__ = error
    return failed


def out_of_memory(error: BaseException) -> bool:
    """Whether the cause is a lack of memory, also if it made something else fail, such as a graph capture."""
    return any(
        isinstance(one, torch.OutOfMemoryError | MemoryError) or any(sign in str(one) for sign in _SIGNS)
        for one in _chain(error)
    )


def free_frames(error: BaseException) -> None:
    """Free the tensors of a failed step, which its traceback would hold for as long as the error lives."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all its causes and contexts."""
    pending, seen = [error], set[int]()
    while pending:
        one = pending.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            pending += [other for other in (one.__cause__, one.__context__) if other is not None]
