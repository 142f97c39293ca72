"""Video files through PyAV: frame times, keyframes, and decoding frames to RGB."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image

from aria.media import rgb
from aria.media.limits import MediaSettings
from aria.media.progress import ProgressCounter
from aria.workers.cancellation import check_cancelled

Fit = Callable[[int, int], tuple[int, int]]
"""Maps the (width, height) of an upright frame to the size to decode it at."""

# Plain containers only: other formats (playlists, concatenations) can refer to further files and addresses.
_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "mxf", "nut", "dv"),
    *("gif", "apng", "h264", "hevc", "m4v", "ivf", "obu", "mjpeg", "rm", "wtv"),
)
_READ_BYTES = 1 << 20
MAX_FRAMES = 4_000_000
"""Maximum number of frames of a clip, so that lists of them fit in memory. Four hours at 240 per second are fewer."""
_UNKNOWN_RATE = Fraction(25)
_BACK = (1, 4)
"""How many keyframes further back to seek when seeking overshoots."""


class MediaFile(Protocol):
    """A named file that can be opened any number of times."""

    @property
    def name(self) -> str:
        """Name for error messages."""

    def file(self) -> BinaryIO:
        """A new file object at position 0."""


class Keyframe(NamedTuple):
    """A frame at which decoding can begin."""

    number: int
    """Index of its packet in the file."""
    time: int | None
    decoding_time: int | None


class Timeline(NamedTuple):
    """Presentation times of the frames of a clip, in units of ``unit`` seconds, and its keyframes."""

    times: list[int]
    """Presentation time of each frame, ascending."""
    numbers: list[int]
    """Index of each frame's packet in the file."""
    end: int
    unit: Fraction
    keys: list[Keyframe]
    untimed: bool
    """The file has no usable timestamps: frames are identified by index and decoded from the beginning."""
    size: tuple[int, int] = (0, 0)
    """(width, height) of a frame, from the header."""

    @property
    def seconds(self) -> Fraction:
        """Duration of the clip."""
        return (self.end - self.times[0]) * self.unit


class DecodeRun(NamedTuple):
    """Frames that are decoded starting from one keyframe."""

    key: int
    """Index of the keyframe."""
    keys: dict[int, Keyframe]
    """The keyframe and earlier ones to fall back on, by index."""
    times: list[int]
    """Presentation times of the frames."""

    @classmethod
    def at(cls, key: int, keys: Sequence[Keyframe]) -> DecodeRun:
        """An empty run for the keyframe with index ``key``."""
        return cls(
            key, {key - back: keys[key - back] for back in (0, *_BACK, *(1 + n for n in _BACK)) if back <= key}, []
        )


class ReadDeadline:
    """Ends the reading of one file, in all threads, when it takes too long or is stopped.

    Args:
        name: Name for error messages.
        seconds: Time limit.
    """

    @classmethod
    def for_job(cls, job: Any, name: str, seconds: float) -> ReadDeadline:
        """For a job. Jobs in worker processes have no limit here: the parent enforces one."""
        return cls(name, math.inf if job.remote else seconds)

    def __init__(self, name: str, seconds: float):
        self._name, self._seconds = name, seconds
        self._end = time.monotonic() + seconds
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make the next :meth:`check` in any thread raise."""
        self._stopped.set()

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def check(self) -> None:
        """To be called between pieces of work.

        Raises:
            ValueError: The time is up.
            Cancelled: The caller was cancelled.
        """
        check_cancelled()
        if self._stopped.is_set() or self.is_over:
            raise ValueError(f"reading {self._name} took longer than {self._seconds:g} s; send a shorter part")


@contextlib.contextmanager
def open_container(clip: MediaFile, settings: MediaSettings, gpu: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a container; yields it and its video stream. FFmpeg errors in the block become ValueErrors.

    Args:
        clip: The file.
        settings: Limits.
        gpu: Index of the GPU whose video decoder to use.

    Raises:
        ValueError: Not a clip, no video stream, damaged, or frames too large.
    """
    import av

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(clip.file())
        options = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "none"}
        hardware = None if gpu is None else gpu_decoding(gpu)
        try:
            container = stack.enter_context(
                # Metadata in other encodings than UTF-8 must not fail.
                av.open(file, options=options, buffer_size=_READ_BYTES, metadata_errors="replace", hwaccel=hardware)
            )
            yield container, _video_stream(container, clip.name, settings)
        except av.FFmpegError as error:
            raise ValueError(
                f"{clip.name} cannot be read as a clip ({error.strerror}); the file may be damaged or of another type"
            ) from error


def gpu_decoding(gpu: int) -> Any:
    """PyAV options to decode with the video decoder of a GPU, without software fallback.

    Frames stay in GPU memory, because only some are needed on the host. Makes the GPU current in this thread.
    """
    import torch
    from av.codec.hwaccel import HWAccel

    # Use PyTorch's CUDA context, which querying a stream makes current in this thread. A context per decoder would take
    # memory and time slices, and the primary context is refused if requested with other flags than PyTorch's.
    torch.cuda.set_device(gpu)
    torch.cuda.current_stream(gpu).query()
    options: dict[str, object] = {"primary_ctx": "0", "current_ctx": "1"}
    return HWAccel("cuda", device=str(gpu), allow_software_fallback=False, options=options, is_hw_owned=True)


def _video_stream(container: Any, name: str, settings: MediaSettings) -> Any:
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if len(streams) > 1 and streams[0].frames == 1:
        # An animated AVIF also has its first image as a still image, marked as the default stream.
        streams = [stream for stream in streams if stream.frames != 1] or streams
    if not streams:
        raise ValueError(f"{name} has no video stream, only {_kinds(container)}")
    stream = max(streams, key=lambda one: (bool(one.disposition & Disposition.default), -one.index))
    context = stream.codec_context
    if context is None:
        raise ValueError(f"{name} uses a codec that is not supported here")
    check_frame_size(context.width, context.height, name, settings)
    return stream


def check_frame_size(width: int, height: int, name: str, settings: MediaSettings) -> None:
    """Reject frames that are too large, before any is decoded.

    Raises:
        ValueError: More pixels than the settings allow.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"{name} declares frames of {width} x {height} pixels; the file may be damaged")
    if width * height > settings.frame_pixels:
        raise ValueError(
            f"{name} declares frames of {width} x {height} pixels, more than the {settings.frame_pixels:,} allowed; "
            "scale it down first"
        )


def _kinds(container: Any) -> str:
    kinds = {"a cover" if stream.type == "video" else stream.type for stream in container.streams}
    return " and ".join(sorted(kinds)) or "nothing"


def scan(clip: MediaFile, settings: MediaSettings, deadline: ReadDeadline) -> Timeline:
    """Read all packets of a clip without decoding them.

    Raises:
        ValueError: As for :func:`open_container`.
    """
    import av

    shown: list[tuple[Any, int, int]] = []
    keys: list[Keyframe] = []
    with open_container(clip, settings) as (container, stream):
        try:
            for number, packet in enumerate(_packets(container, stream, deadline)):
                if packet.is_keyframe or not keys:
                    keys.append(Keyframe(number, packet.pts, packet.dts))
                if not packet.is_discard:  # outside the edit list
                    shown.append((packet.pts, number, max(packet.duration or 0, 0)))
                if number == MAX_FRAMES:
                    raise ValueError(f"{clip.name} holds more than {MAX_FRAMES:,} frames; send a part of it")
        except av.FFmpegError:
            if not shown:  # otherwise only the end is damaged, and the rest is used
                raise
        if not shown:
            raise ValueError(f"{clip.name} holds no frames; the file may be truncated or damaged")
        size = stream.codec_context.width, stream.codec_context.height
        rate = Fraction(stream.average_rate or stream.guessed_rate or _UNKNOWN_RATE)
        if _has_timestamps(container, stream, [moment for moment, *_ in shown]):
            shown.sort()
            times = [moment for moment, *_ in shown]
            unit = Fraction(stream.time_base)
            last = shown[-1][2] or (times[-1] - times[-2] if len(times) > 1 else 0) or int(1 / (rate * unit)) or 1
            return Timeline(times, [number for _, number, _ in shown], times[-1] + last, unit, keys, False, size)
    order = list(range(len(shown)))
    return Timeline(order, order, len(order), 1 / rate, [Keyframe(0, None, None)], True, size)


def _packets(container: Any, stream: Any, deadline: ReadDeadline) -> Iterator[Any]:
    more = True
    while more:
        more = False
        try:
            for packet in container.demux(stream):
                deadline.check()
                if packet.size:  # an empty packet marks the end
                    yield packet
        except IndexError:
            # PyAV fails on a stream that appears after the beginning; demuxing again works.
            more = True


def _has_timestamps(container: Any, stream: Any, times: Sequence[int | None]) -> bool:
    if any(moment is None for moment in times):
        return False
    # AVI has no timestamps. Those that FFmpeg makes up are wrong if frames are not stored in presentation order.
    rising = all(a < b for a, b in itertools.pairwise(times))  # type: ignore[operator]
    return not (container.format.name == "avi" and stream.codec_context.has_b_frames and rising)


class ClipDecoder:
    """Decodes frames of a clip at given times.

    Args:
        clip: The file.
        untimed: As in :class:`Timeline`.
        fit: Maps the (width, height) of a frame to the size to decode it at.
        threads: Number of codec threads.
        settings: Limits.
        deadline: Ends the decoding.
        gpu: Index of the GPU whose video decoder to use. Frames that it cannot decode are missing from the result.
        progress: Counts the decoded frames.
    """

    def __init__(
        self,
        clip: MediaFile,
        untimed: bool,
        fit: Fit,
        threads: int,
        settings: MediaSettings,
        deadline: ReadDeadline,
        gpu: int | None = None,
        progress: ProgressCounter | None = None,
    ):
        from av.video.reformatter import VideoReformatter

        self._clip, self._untimed, self._fit, self._threads = clip, untimed, fit, threads
        self._settings, self._deadline, self._gpu, self._progress = settings, deadline, gpu, progress
        self._scaler = VideoReformatter()
        self._files = contextlib.ExitStack()
        self._container: Any = None

    def __enter__(self) -> ClipDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def decode(self, run: DecodeRun) -> dict[int, np.ndarray]:
        """Decode the frames of a run to RGB, by time. Frames that cannot be decoded are missing."""
        frames = self._attempt(run, run.key, run.times, skip=not self._untimed)
        missing = [moment for moment in run.times if moment not in frames]
        if missing and not self._untimed and self._gpu is None:
            # Gradual intra refresh, or frames marked as non-reference that are referenced anyway.
            frames |= self._attempt(run, max(run.key - 1, 0), missing, skip=False)
        return frames

    def _attempt(self, run: DecodeRun, key: int, times: Sequence[int], *, skip: bool) -> dict[int, np.ndarray]:
        from av import FFmpegError

        wanted, frames = set(times), {}
        number = itertools.count()
        untimed = self._untimed

        def take(packet: Any) -> None:
            with contextlib.suppress(FFmpegError):  # a damaged packet; continue with the next
                for frame in self._context.decode(packet):
                    moment = next(number) if untimed else frame.pts
                    if moment in wanted:
                        frames[moment] = self._rgb(frame)
                        if self._progress is not None:
                            self._progress.add()

        unfed = set(times)
        for packet in self._packets_from(run.keys, key):
            # Unwanted non-reference frames need not be decoded.
            self._context.skip_frame = "NONREF" if skip and packet.pts not in wanted else "DEFAULT"
            take(packet)
            unfed -= frames.keys() if untimed else {packet.pts}
            if not unfed:
                break
        take(None)
        return frames

    def _packets_from(self, keys: Mapping[int, Keyframe], key: int) -> Iterator[Any]:
        """Packets starting at a keyframe; if seeking does not find it, the file is read from the beginning."""
        from av import FFmpegError

        # Some containers seek by estimate and overshoot; then seek to an earlier keyframe.
        for aim in (key, *(key - back for back in _BACK)):
            if aim <= 0 or keys[aim].decoding_time is None or keys[key].decoding_time is None:
                break
            found = False
            with contextlib.suppress(FFmpegError):
                for packet in self._packets_after(keys[aim].decoding_time):
                    if not found and packet.dts is not None and packet.dts > keys[key].decoding_time:
                        break
                    found = found or (packet.dts, packet.pts) == (keys[key].decoding_time, keys[key].time)
                    if found:
                        yield packet
            if found:
                return
        self._open()
        with contextlib.suppress(FFmpegError):
            for number, packet in enumerate(_packets(self._container, self._stream, self._deadline)):
                if number >= keys[key].number:
                    yield packet

    def _packets_after(self, moment: int | None) -> Iterator[Any]:
        if self._container is None:
            self._open()
        self._container.seek(moment, stream=self._stream)
        yield from _packets(self._container, self._stream, self._deadline)

    def _open(self) -> None:
        self._files.close()
        self._container, self._stream = self._files.enter_context(open_container(self._clip, self._settings, self._gpu))
        self._context = self._stream.codec_context
        self._context.thread_count = self._threads
        self._context.thread_type = "AUTO"
        # Also limits frames that are larger than the header says.
        self._context.options = {"max_pixels": str(self._settings.frame_pixels)}

    def _rgb(self, frame: Any) -> np.ndarray:
        from av import VideoFrame
        from av.video.reformatter import Interpolation

        turned, down, right = _orientation(frame)
        if self._settings.background is not None and any(part.is_alpha for part in frame.format.components):
            rgba = self._scaler.reformat(frame, format="rgba").to_ndarray()
            opaque = np.asarray(rgb.composite(Image.fromarray(rgba), self._settings.background))
            frame = VideoFrame.from_ndarray(opaque, "rgb24")
        width, height = frame.width, frame.height
        # Non-square pixels.
        ratio = self._stream.sample_aspect_ratio or 1
        if ratio != 1 and Fraction(1, 4) <= ratio <= 4:
            width = max(1, round(width * ratio))
        if turned:
            height, width = self._fit(height, width)
        else:
            width, height = self._fit(width, height)
        pixels = self._scaler.reformat(
            frame,
            width,
            height,
            "rgb24",
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
            threads=1,
        ).to_ndarray()
        if turned:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if right else 1])


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """How to orient a frame: (transpose, then flip vertically, then flip horizontally).

    From the display matrix, which maps (x, y) to (a x + c y, b x + d y). Rotations by other than multiples of 90
    degrees are ignored.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
    if a == d == 0:
        return True, b < 0, c < 0
    return False, d < 0, a < 0
