"""Cancelling work in threads: downloads, decoding and drawing stop when nobody waits for their result any more."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.25
"""Most seconds that a wait for something outside (a socket, a drawing library) lasts before it checks again."""

_cancelled: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("cancelled", default=None)


class Cancelled(BaseException):
    """The caller has gone. Not an ``Exception``, so that handlers of damaged files and lost connections let it pass."""


def check_cancelled() -> None:
    """Called between pieces of work, and at least every :data:`POLL_SECONDS` while waiting.

    Raises:
        Cancelled: the coroutine that waits for this thread was cancelled.
    """
    event = _cancelled.get()
    if event is not None and event.is_set():
        raise Cancelled


async def run_cancellable(executor: Executor | None, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread; cancelling this coroutine also makes :func:`check_cancelled` raise there.

    Args:
        executor: a pool of threads; None: the event loop's own.
        work: called without arguments.
    """
    event = threading.Event()
    context = contextvars.copy_context()
    context.run(_cancelled.set, event)
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, context.run, work)
    finally:
        event.set()


def map_in_context(executor: Executor, function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """``executor.map`` whose threads are cancelled with the calling one. The first error in order is raised."""
    futures = [
        executor.submit(contextvars.copy_context().run, function, *call) for call in zip(*arguments, strict=True)
    ]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
