"""Limits and permissions for media: every limit is a field of :class:`MediaSettings`."""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from PIL import ImageColor

from aria.settings import Setting, check_ranges
from aria.workers import BusyError, NotReady, retry_until_ready
from aria.workers.cancellation import check_cancelled

MAX_DEFAULT_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """Limits and permissions for images, videos and documents; the defaults suit a library on one's own machine.

    Limits on bytes apply to what is held in memory: bytes, data: URIs and downloads. Files are read in place.
    ``aria serve`` has an option for each field that names one.

    Raises:
        ValueError: A value is out of its range.
    """

    image_bytes: Annotated[
        int, Setting(help="Maximum size of an image.", option="--max-image-bytes", unit="bytes", minimum=1)
    ] = 64 << 20
    video_bytes: Annotated[
        int, Setting(help="Maximum size of a video.", option="--max-video-bytes", unit="bytes", minimum=1)
    ] = 1 << 30
    document_bytes: Annotated[
        int, Setting(help="Maximum size of a PDF.", option="--max-document-bytes", unit="bytes", minimum=1)
    ] = 256 << 20
    image_pixels: Annotated[int, Setting(help="Maximum size of an image, by its header.", unit="pixels", minimum=1)] = (
        120_000_000
    )
    """As RGB, 120 million pixels take 360 MB."""
    frame_pixels: Annotated[int, Setting(help="Maximum size of a video frame.", unit="pixels", minimum=1)] = 36_000_000
    """8K video has 33 million."""
    page_pixels: Annotated[int, Setting(help="Maximum size of a rendered page.", unit="pixels", minimum=1)] = 36_000_000
    """A0 has 32 million."""
    prompt_pixels: Annotated[
        int,
        Setting(
            help="Maximum number of pixels of all media in one request.",
            option="--max-prompt-pixels",
            unit="pixels",
            minimum=1,
        ),
    ] = 1_000_000_000
    """Images, frames and pages together, counted by their headers before any is decoded."""
    decoded_bytes: Annotated[
        int | None,
        Setting(help="Memory for decoding and its results, in all.", option="--decoded-bytes", unit="bytes", minimum=1),
    ] = None
    """Shared by the whole process: everything that is being decoded, or was decoded and is still needed. As much again
    may be held by files that wait to be decoded. Media that do not fit wait. Decoding takes up to 16 bytes a pixel;
    results are resized to what the model takes, 3 bytes a pixel. None: no limit."""
    workers: Annotated[
        int | None,
        Setting(
            help="Number of sandboxed decoder processes; default: one per core, up to 8. 0 decodes in this process.",
            option="--media-workers",
            minimum=0,
        ),
    ] = 0
    """Worker processes are ended when they take too long or nobody waits for them. With 0, a file that crashes a
    decoder ends this process. None: one per core, up to 8."""
    worker_bytes: Annotated[
        int, Setting(help="Address space of a decoder process.", option="--worker-bytes", unit="bytes", minimum=1)
    ] = 3 << 30
    background: Annotated[
        str | None,
        Setting(
            help="Color behind transparent pixels, such as white or #202020; none keeps stored colors.",
            option="--image-background",
        ),
    ] = "white"
    """None: stored colors, often black, as transformers does."""
    clip_seconds: Annotated[
        float, Setting(help="Maximum length of a video.", option="--max-clip-seconds", unit="seconds", above=0)
    ] = 4 * 3600.0
    max_frames: Annotated[
        int, Setting(help="Maximum number of frames taken of a video.", option="--max-frames", minimum=1)
    ] = 256
    max_pages: Annotated[
        int, Setting(help="Maximum number of pages taken of a document.", option="--max-pages", minimum=1)
    ] = 64
    cache_bytes: Annotated[
        int, Setting(help="Size of the cache of decoded frames and pages; 0 disables it.", unit="bytes", minimum=0)
    ] = 512 << 20
    clip_decoder: Annotated[
        str,
        Setting(
            help="Video decoder: cpu, cuda:N, or auto, which uses the model's GPU if possible.", option="--clip-decoder"
        ),
    ] = "auto"
    """What a GPU's decoder cannot read is decoded on the CPU."""
    image_timeout: Annotated[
        float,
        Setting(help="Time limit for decoding an image.", option="--image-seconds", unit="seconds", above=0),
    ] = 30.0
    """Not enforced without ``workers``."""
    decode_timeout: Annotated[
        float,
        Setting(
            help="Time limit for decoding a video or document.", option="--decode-seconds", unit="seconds", above=0
        ),
    ] = 300.0
    connect_timeout: Annotated[
        float, Setting(help="Time limit for connecting to an address.", unit="seconds", above=0)
    ] = 10.0
    read_timeout: Annotated[
        float, Setting(help="Time without a byte after which a download is given up.", unit="seconds", above=0)
    ] = 10.0
    total_timeout: Annotated[
        float,
        Setting(
            help="Time limit for fetching one medium from its URL.",
            option="--fetch-seconds",
            unit="seconds",
            above=0,
        ),
    ] = 120.0
    max_redirects: Annotated[int, Setting(help="Maximum number of redirects that are followed.", minimum=0)] = 5
    local_folders: Annotated[
        tuple[Path, ...] | None,
        Setting(help="Folder whose files requests may reference; repeatable.", option="--allow-local"),
    ] = None
    """Links are resolved before this is checked. None: any file, (): none."""
    private_addresses: Annotated[
        bool,
        Setting(help="Let requests fetch from this machine and its network.", option="--allow-private-addresses"),
    ] = False

    @classmethod
    def untrusted(cls, **changes: Any) -> MediaSettings:
        """Settings for untrusted input: decoded in worker processes, with tighter limits and no local files."""
        strict = {
            "workers": None,
            "decoded_bytes": 2 << 30,
            "decode_timeout": 120.0,
            "prompt_pixels": 400_000_000,
            "local_folders": (),
        }
        return cls(**{**strict, **changes})

    @property
    def worker_count(self) -> int:
        """``workers``, or the number of cores, at most 8."""
        return min(available_cores(), MAX_DEFAULT_WORKERS) if self.workers is None else self.workers

    def __post_init__(self) -> None:
        check_ranges(self)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.clip_decoder):
            raise ValueError(f"clip_decoder is {self.clip_decoder!r}; expected auto, cpu, cuda or cuda:N")
        if self.background is not None and not _is_color(self.background):
            raise ValueError(f'background is {self.background!r}; expected a color such as "white" or "#fff", or None')
        if isinstance(self.local_folders, str | Path):
            raise ValueError(f"local_folders is {str(self.local_folders)!r}; expected a tuple of folders")
        if self.local_folders is not None:
            object.__setattr__(self, "local_folders", tuple(Path(folder) for folder in self.local_folders))


def _is_color(value: Any) -> bool:
    try:
        return len(ImageColor.getrgb(value)) == 3
    except (ValueError, AttributeError, TypeError):
        return False


class JobFile:
    """The input file of a job as a :class:`~aria.media.container.MediaFile`.

    Args:
        job: The job, see :class:`aria.workers.child.Job`.
        name: Name for error messages.
    """

    def __init__(self, job: Any, name: str):
        self._job, self.name = job, name

    def file(self) -> BinaryIO:
        """A new file object at position 0."""
        return self._job.file()  # type: ignore[no-any-return]


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


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shorten(source: str) -> str:
    """Quote an address or path for a message, shortened to fit a line."""
    return repr(source if len(source) <= 100 else source[:80] + "...")
