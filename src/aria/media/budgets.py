"""Budgets of pixels and memory that media spend before they are decoded."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

import numpy as np

from aria.workers import BusyError, NotReady, retry_until_ready
from aria.workers.cancellation import check_cancelled


class PixelBudget:
    """The pixels that all images, frames and pages of one prompt may have in total. Thread-safe."""

    def __init__(self, pixels: int):
        self._total = self._left = pixels
        self._lock = threading.Lock()

    def spend(self, pixels: int) -> None:
        """Subtract pixels from the budget.

        Raises:
            ValueError: The budget is exceeded.
        """
        with self._lock:
            self._left -= pixels
            if self._left < 0:
                raise ValueError(
                    f"the images, frames and pages of one prompt have more than the {self._total:,} pixels allowed in "
                    "total; send fewer or smaller ones"
                )


class MemoryBudget:
    """Memory of the whole process reserved for decoding and its results. Thread-safe."""

    SMALL = 16
    """Requests for less than 1/16 of the budget may use all of it, larger ones three quarters: a few large images do
    not block small ones."""

    def __init__(self) -> None:
        self.reserved = 0
        self._lock = threading.Lock()
        self._reclaimers: list[weakref.WeakMethod[Callable[[int], object]]] = []

    def on_shortage(self, reclaim: Callable[[int], object]) -> None:
        """Register a bound method to call when memory is short, with the number of bytes to free. Held weakly."""
        with self._lock:
            self._reclaimers.append(weakref.WeakMethod(reclaim))

    def reserve(self, nbytes: int, limit: int | None) -> None:
        """Reserve bytes, keeping the total within ``limit``.

        Raises:
            ValueError: More bytes than the limit.
            NotReady: Others must release memory first.
        """
        usable = limit if limit is None or nbytes * self.SMALL < limit else limit * 3 // 4
        if limit is not None and nbytes > limit:
            raise ValueError(
                f"reading it would take {nbytes:,} bytes of memory, but {limit:,} are allowed for all media; send "
                "smaller or fewer ones"
            )
        if usable is not None and nbytes > usable:
            usable = limit
        for attempt in range(2):
            with self._lock:
                short = 0 if usable is None else self.reserved + nbytes - usable
                if short <= 0:
                    self.reserved += nbytes
                    return
                reclaimers = [reclaim for one in self._reclaimers if (reclaim := one()) is not None]
            if not attempt:
                for reclaim in reclaimers:
                    reclaim(short)
        raise NotReady

    def release(self, nbytes: int) -> None:
        with self._lock:
            self.reserved -= nbytes

    def track(self, array: np.ndarray) -> None:
        """Release the bytes of an array, already reserved, when it is garbage-collected."""
        assert array.base is None, "a view does not own its memory; track the array that does"
        weakref.finalize(array, self.release, array.nbytes)


DECODE_MEMORY = MemoryBudget()
"""The budget of this process for decoding and its results."""
RECEIVED_MEMORY = MemoryBudget()
"""The budget of this process for files in memory that wait to be decoded. It is separate, so that waiting files leave
room for decoding."""


class MemoryReservation:
    """A growing reservation in :data:`RECEIVED_MEMORY`.

    Args:
        limit: As in :meth:`MemoryBudget.reserve`.
        seconds: How long :meth:`grow` waits for memory.
    """

    def __init__(self, limit: int | None, seconds: float):
        self._limit, self._seconds, self._nbytes = limit, seconds, 0

    def grow(self, nbytes: int) -> None:
        """Reserve more bytes, waiting for others to release them if necessary.

        Raises:
            ValueError: More bytes than the limit.
            BusyError: No memory was released in time.
            Cancelled: The caller was cancelled.
        """
        end = time.monotonic() + self._seconds

        def check() -> None:
            check_cancelled()
            if time.monotonic() > end:
                raise BusyError("too many media are waiting to be read; try again later")

        retry_until_ready(RECEIVED_MEMORY.reserve, (nbytes, self._limit), check)
        self._nbytes += nbytes

    def release(self) -> None:
        """Release all reserved bytes."""
        RECEIVED_MEMORY.release(self._nbytes)
        self._nbytes = 0
