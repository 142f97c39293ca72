"""What media may cost and where they may come from: every limit on them is a field here."""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ImageColor

from aria.workers import BusyError, NotReady, retry_until_ready
from aria.workers.cancellation import check_cancelled

MAX_DEFAULT_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """Limits and permissions for pictures, clips and documents; the defaults suit a library on one's own machine.

    Limits on bytes hold for what comes into memory: bytes, data: URIs, what addresses send. Files are read in place.

    Raises:
        ValueError: a value out of its limits.
    """

    image_bytes: int = 64 << 20
    video_bytes: int = 1 << 30
    document_bytes: int = 256 << 20
    image_pixels: int = 120_000_000
    """A picture whose header announces more is refused before it is decoded (120 million are 360 MB as RGB)."""
    frame_pixels: int = 36_000_000
    """The same for the frames of a clip; 8K has 33 million."""
    page_pixels: int = 36_000_000
    """The same for a page as it is rendered; A0 has 32 million."""
    prompt_pixels: int = 1_000_000_000
    """Pixels of all images, frames and pages of one prompt together, as files announce them: they are spent before any
    is decoded."""
    decoded_bytes: int | None = None
    """Memory that may be taken at a time, in the whole process, by everything that is being decoded and by what was
    decoded and is still needed, and as much again by files that are still to be decoded; what does not fit waits.
    Decoding takes up to 16 bytes a pixel; what stays is brought to the size that the model takes, 3 bytes a pixel.
    None: any amount."""
    workers: int | None = 0
    """Processes that decode at a time, confined, and ended when they take too long or when nobody waits any more. 0:
    this process decodes, so that a file which crashes a decoder ends it. None: as many as there are cores, up to 8."""
    worker_bytes: int = 3 << 30
    """Address space that such a process may take."""
    background: str | None = "white"
    """Colour behind the transparent pixels of images and clips, a name or ``#rrggbb``. None: their stored colours,
    often black, which is what transformers shows the model."""
    clip_seconds: float = 4 * 3600.0
    max_frames: int = 256
    """Most frames of one clip that a prompt may hold."""
    max_pages: int = 64
    """Most pages of one document that a prompt may hold."""
    cache_bytes: int = 512 << 20
    """Most bytes of frames and pages that are kept for the next question about the same clip or document; 0: none."""
    clip_decoder: str = "auto"
    """What decodes clips: ``cpu``, ``cuda:0`` (a GPU's video decoder; what that cannot read falls to the CPU), or
    ``auto``: the GPU that this process works on, where it does and the driver lets it."""
    image_timeout: float = 30.0
    """Seconds that reading one image may take; without ``workers`` nothing ends it."""
    decode_timeout: float = 300.0
    """Seconds that reading one clip or document may take."""
    connect_timeout: float = 10.0
    """Seconds until an address has to take a connection."""
    read_timeout: float = 10.0
    """Seconds without a byte after which an address is given up."""
    total_timeout: float = 120.0
    """Seconds after which an address is given up, however slowly it keeps sending."""
    max_redirects: int = 5
    local_folders: tuple[Path, ...] | None = None
    """Folders under which files may be read; None: anywhere, (): nowhere. Links are followed before this is decided."""
    private_addresses: bool = False
    """Whether addresses may lead to this machine, the local network, or any other place that is not public."""

    @classmethod
    def untrusted(cls, **changes: Any) -> MediaSettings:
        """For media that strangers send: decoded in processes of their own, within bounds of time and memory, and none
        of this machine's files."""
        strict = {"workers": None, "decoded_bytes": 2 << 30, "decode_timeout": 120.0, "local_folders": ()}
        return cls(**{**strict, **changes})

    @property
    def worker_count(self) -> int:
        """``workers``, or as many as there are cores, at most 8."""
        return min(available_cores(), MAX_DEFAULT_WORKERS) if self.workers is None else self.workers

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("workers", "decoded_bytes") and value is None:
                continue
            if field.name in ("max_redirects", "cache_bytes", "workers"):
                if value < 0:
                    raise ValueError(f"{field.name} is {value}; expected 0 or more")
            elif field.name == "clip_decoder":
                if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
                    raise ValueError(f"clip_decoder is {value!r}; expected auto, cpu, cuda or cuda:N")
            elif field.name == "background":
                if value is not None and not _is_color(value):
                    raise ValueError(f'background is {value!r}; expected a colour such as "white" or "#fff", or None')
            elif field.name not in ("local_folders", "private_addresses") and not value > 0:
                raise ValueError(f"{field.name} is {value}; expected more than 0")
        if isinstance(self.local_folders, str | Path):
            raise ValueError(f"local_folders is {str(self.local_folders)!r}; expected a tuple of folders")
        if self.local_folders is not None:
            object.__setattr__(self, "local_folders", tuple(Path(folder) for folder in self.local_folders))


def _is_color(value: object) -> bool:
    try:
        return len(ImageColor.getrgb(value)) == 3  # type: ignore[arg-type]  # anything but a str is an error below
    except (ValueError, AttributeError, TypeError):
        return False


class JobFile:
    """The file that a job reads, see :class:`aria.workers.child.Job`.

    Args:
        job: has it.
        name: what errors call it.
    """

    def __init__(self, job: Any, name: str):
        self._job, self.name = job, name

    def file(self) -> BinaryIO:
        """It, open for reading at its beginning, with a position of its own."""
        return self._job.file()  # type: ignore[no-any-return]


class PixelBudget:
    """What the pictures, frames and pages of one prompt may take together; several threads may spend it."""

    def __init__(self, pixels: int):
        self._as_int = self._left = pixels
        self._lock = threading.Lock()

    def spend(self, pixels: int) -> None:
        """Take pixels from what is left.

        Raises:
            ValueError: there are not so many left.
        """
        with self._lock:
            self._left -= pixels
            if self._left < 0:
                raise ValueError(
                    f"the pictures, frames and pages of one prompt have more than the {self._as_int:,} pixels that are "
                    "allowed together; send fewer or smaller ones"
                )


class MemoryBudget:
    """Bytes that decoding and its results take, in the whole process; several threads may take and give back."""

    SMALL = 16
    """Whatever takes less than this part of the budget may use all of it, and larger things three quarters: a few
    large images do not keep small ones waiting."""

    def __init__(self) -> None:
        self.reserved = 0
        self._lock = threading.Lock()
        self._reclaimers: list[weakref.WeakMethod[Callable[[int], object]]] = []

    def on_shortage(self, reclaim: Callable[[int], object]) -> None:
        """Have a bound method called with a number of bytes to free, where it can, when memory is short. Its object is
        held weakly."""
        with self._lock:
            self._reclaimers.append(weakref.WeakMethod(reclaim))

    def reserve(self, nbytes: int, limit: int | None) -> None:
        """Take bytes, so that no more than ``limit`` are taken in all.

        Raises:
            ValueError: there will never be so many.
            NotReady: others have to give some back first.
        """
        usable = limit if limit is None or nbytes * self.SMALL < limit else limit * 3 // 4
        if limit is not None and nbytes > limit:
            raise ValueError(
                f"reading it would take {nbytes:,} bytes of memory, and {limit:,} are allowed for all media "
                "together; send smaller or fewer ones"
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
        """Count the bytes of an array, which were taken, until nobody holds it or a view of it."""
        assert array.base is None, "views of an array may outlive it, and not the one that has the memory"
        weakref.finalize(array, self.release, array.nbytes)


DECODE_MEMORY = MemoryBudget()
"""The process's, for decoding and its results."""
RECEIVED_MEMORY = MemoryBudget()
"""The process's, for files in memory that are still to be decoded. It is another one, so that what waits to be decoded
leaves room for decoding."""


class MemoryReservation:
    """Bytes of :data:`RECEIVED_MEMORY`, taken piece by piece.

    Args:
        limit: as in :meth:`MemoryBudget.take`.
        seconds: for which a piece is waited for.
    """

    def __init__(self, limit: int | None, seconds: float):
        self._limit, self._seconds, self._nbytes = limit, seconds, 0

    def grow(self, nbytes: int) -> None:
        """Take more.

        Raises:
            ValueError: there will never be so many.
            BusyError: others have them.
            Cancelled: nobody waits any more.
        """
        end = time.monotonic() + self._seconds

        def check() -> None:
            check_cancelled()
            if time.monotonic() > end:
                raise BusyError("too many media are waiting to be read; try again later")

        retry_until_ready(RECEIVED_MEMORY.reserve, (nbytes, self._limit), check)
        self._nbytes += nbytes

    def release(self) -> None:
        """Give all of them back."""
        RECEIVED_MEMORY.release(self._nbytes)
        self._nbytes = 0


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shorten(source: str) -> str:
    """An address or path for a message: quoted, and not longer than a line."""
    return repr(source if len(source) <= 100 else source[:80] + "...")
