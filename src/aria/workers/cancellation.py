"""Cancellation of work in threads: downloads, decoding and rendering stop when their caller is cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.25
"""Maximum seconds to block (on a socket, in a rendering library) before checking for cancellation."""

_cancelled: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("cancelled", default=None)


class Cancelled(BaseException):
    """The caller was cancelled. Not an ``Exception``, so that handlers of other errors let it pass."""


def check_cancelled() -> None:
    """To be called between pieces of work, and at least every :data:`POLL_SECONDS` while waiting.

    Raises:
        Cancelled: The coroutine that awaits this thread was cancelled.
    """
    event = _cancelled.get()
    if event is not None and event.is_set():
        raise Cancelled


async def run_cancellable(executor: Executor | None, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread. Cancelling this coroutine makes :func:`check_cancelled` raise in the thread.

    Args:
        executor: Thread pool; None: the default executor of the event loop.
        work: Called without arguments.
    """
    event = threading.Event()
    context = contextvars.copy_context()
    context.run(_cancelled.set, event)
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, context.run, work)
    finally:
        event.set()


def map_in_context(executor: Executor, function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """Like ``executor.map``, but the threads are cancelled with the calling one. Raises the first error in order."""
    futures = [
        executor.submit(contextvars.copy_context().run, function, *call) for call in zip(*arguments, strict=True)
    ]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
