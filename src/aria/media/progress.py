"""Progress reports while the media of a prompt are read."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How much of a clip, a document or a set of images has been read."""

    kind: str
    """"image", "video" or "document"."""
    done: int
    """Number of images, frames or pages read."""
    total: int
    """Number of images, frames or pages to read."""


_listener: contextvars.ContextVar[Callable[[Progress], object] | None] = contextvars.ContextVar(
    "progress", default=None
)


def listen(listener: Callable[[Progress], object]) -> None:
    """Register a listener in this context and its copies, including threads started by
    :mod:`aria.workers.cancellation`.

    Args:
        listener: Called in the thread that reads; must be fast and thread-safe.
    """
    _listener.set(listener)


def report(progress: Progress) -> None:
    """Call the listener of this context, if there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(progress)


def forward_progress(job: Any) -> None:
    """In a worker process: forward the progress of this context to the parent."""
    if job.remote:
        listen(lambda progress: job.call("progress", *progress))


class ProgressCounter:
    """Counts and reports what has been read. Thread-safe.

    Args:
        kind: "image", "video" or "document".
        total: Number of images, frames or pages to read.
    """

    def __init__(self, kind: str, total: int):
        self._kind, self._total, self._done = kind, total, 0
        self._lock = threading.Lock()
        self._report(0)

    def add(self) -> None:
        """Count one more."""
        with self._lock:
            self._done = min(self._done + 1, self._total)
            self._report(self._done)

    def _report(self, done: int) -> None:
        if self._total:
            report(Progress(self._kind, done, self._total))
