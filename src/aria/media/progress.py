"""How far the media of a prompt have been read, for whoever waits for them."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """A medium, or several images, while they are read."""

    kind: str
    """image, video or document."""
    done: int
    """Images, frames or pages that have been read."""
    total: int
    """Of how many."""


_listener: contextvars.ContextVar[Callable[[Progress], object] | None] = contextvars.ContextVar(
    "progress", default=None
)


def listen(listener: Callable[[Progress], object]) -> None:
    """Have progress reported from now on in this context and its copies, so also from threads that
    :mod:`aria.workers.cancellation` starts.

    Args:
        listener: called in whichever thread reads; must be quick and thread-safe.
    """
    _listener.set(listener)


def report(progress: Progress) -> None:
    """Tell whoever listens in this context."""
    listener = _listener.get()
    if listener is not None:
        listener(progress)


def forward_progress(job: Any) -> None:
    """In a worker: have the progress of this context reported to the process that asked for the job."""
    if job.remote:
        listen(lambda progress: job.call("progress", *progress))


class ProgressCounter:
    """Counts what has been read, in any thread.

    Args:
        kind: image, video or document.
        total: how many images, frames or pages there are to read.
    """

    def __init__(self, kind: str, total: int):
        self._kind, self._total, self._done = kind, total, 0
        self._lock = threading.Lock()
        self._report(0)

    def add(self) -> None:
        """One more has been read."""
        with self._lock:
            self._done = min(self._done + 1, self._total)
            self._report(self._done)

    def _report(self, done: int) -> None:
        if self._total:
            report(Progress(self._kind, done, self._total))
