"""Limits and permissions for media: every limit is a field of :class:`MediaSettings`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from PIL import ImageColor

from aria.settings import Setting, check_ranges

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


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shorten(source: str) -> str:
    """Quote an address or path for a message, shortened to fit a line."""
    return repr(source if len(source) <= 100 else source[:80] + "...")
