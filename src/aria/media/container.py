"""The files that clips come in (PyAV): when each frame is shown, where decoding can begin, and frames as RGB."""

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
"""(width, height) of an upright frame -> what it should become."""

# Containers of moving pictures alone: others (playlists, concatenations) can name further files and addresses.
_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "mxf", "nut", "dv"),
    *("gif", "apng", "h264", "hevc", "m4v", "ivf", "obu", "mjpeg", "rm", "wtv"),
)
_READ_BYTES = 1 << 20
MAX_FRAMES = 4_000_000
"""Of a clip, so that lists of them fit into memory: four hours at 240 a second are fewer."""
_UNKNOWN_RATE = Fraction(25)
_BACK = (1, 4)
"""Keyframes before the one that is sought, aimed at where seeking goes past it."""


class MediaFile(Protocol):
    """A file to be read."""

    @property
    def name(self) -> str:
        """What errors call it."""

    def file(self) -> BinaryIO:
        """It, open for reading at its beginning, with a position of its own."""


class Keyframe(NamedTuple):
    """A keyframe."""

    number: int
    """Of its packet in the file."""
    time: int | None
    decoding_time: int | None


class Timeline(NamedTuple):
    """When the frames of a clip are shown, in units of ``unit`` seconds, and where decoding can begin."""

    times: list[int]
    """Of each frame, in the order in which they are shown."""
    numbers: list[int]
    """Of each frame's packet in the file."""
    end: int
    unit: Fraction
    keys: list[Keyframe]
    untimed: bool
    """The file tells no times: frames are told by their number, and decoded from the beginning."""
    size: tuple[int, int] = (0, 0)
    """(width, height) of a frame, as the file's header has it."""

    @property
    def seconds(self) -> Fraction:
        """Length of the clip."""
        return (self.end - self.times[0]) * self.unit


class DecodeRun(NamedTuple):
    """Frames that are decoded from one keyframe on."""

    key: int
    """Its index among all keyframes."""
    keys: dict[int, Keyframe]
    """By index: itself, and those before it that decoding may have to begin at instead."""
    times: list[int]
    """Of the frames."""

    @classmethod
    def at(cls, key: int, keys: Sequence[Keyframe]) -> DecodeRun:
        """One without frames, of the keyframe with an index."""
        return cls(
            key, {key - back: keys[key - back] for back in (0, *_BACK, *(1 + n for n in _BACK)) if back <= key}, []
        )


class ReadDeadline:
    """Ends the reading of one clip, in all its threads, when it takes too long or is given up.

    Args:
        name: what errors call it.
        seconds: that it may take.
    """

    @classmethod
    def for_job(cls, job: Any, name: str, seconds: float) -> ReadDeadline:
        """For a job; who waits for one in another process has a deadline of its own."""
        return cls(name, math.inf if job.remote else seconds)

    def __init__(self, name: str, seconds: float):
        self._name, self._seconds = name, seconds
        self._end = time.monotonic() + seconds
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Give it up."""
        self._stopped.set()

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def check(self) -> None:
        """Called between pieces of work.

        Raises:
            ValueError: the time is up.
            Cancelled: nobody waits for the result any more.
        """
        check_cancelled()
        if self._stopped.is_set() or self.is_over:
            raise ValueError(f"reading {self._name} took longer than {self._seconds:g} s; send a shorter part")


@contextlib.contextmanager
def opened(clip: MediaFile, settings: MediaSettings, gpu: int | None = None) -> Iterator[tuple[Any, Any]]:
    """The container and its stream of moving pictures; what goes wrong inside becomes a ValueError.

    Args:
        clip: the file.
        settings: limits.
        gpu: number of a GPU whose video decoder is to do it.

    Raises:
        ValueError: no clip, one without moving pictures, a damaged one, or one with too large frames.
    """
    import av

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(clip.file())
        options = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "none"}
        hardware = None if gpu is None else gpu_decoding(gpu)
        try:
            container = stack.enter_context(
                # Titles in other codings than UTF-8 are no reason to fail.
                av.open(file, options=options, buffer_size=_READ_BYTES, metadata_errors="replace", hwaccel=hardware)
            )
            yield container, _video_stream(container, clip.name, settings)
        except av.FFmpegError as error:
            raise ValueError(
                f"{clip.name} cannot be read as a clip ({error.strerror}); the file may be damaged, or of another kind"
            ) from error


def gpu_decoding(gpu: int) -> Any:
    """PyAV's order to decode with a GPU's video decoder and nothing else; frames stay there, since few of them are
    wanted here. For this thread the GPU with that number becomes the current one."""
    import torch
    from av.codec.hwaccel import HWAccel

    # PyTorch's own context, which asking a stream brings into this thread: one more for each decoder would take memory
    # and turns, and the shared one is refused to whoever asks for it with other flags than PyTorch's.
    torch.cuda.set_device(gpu)
    torch.cuda.current_stream(gpu).query()
    options: dict[str, object] = {"primary_ctx": "0", "current_ctx": "1"}
    return HWAccel("cuda", device=str(gpu), allow_software_fallback=False, options=options, is_hw_owned=True)


def _video_stream(container: Any, name: str, settings: MediaSettings) -> Any:
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if len(streams) > 1 and streams[0].frames == 1:
        # An animated AVIF begins with its first picture as a still one, of which it also says that it is the default.
        streams = [stream for stream in streams if stream.frames != 1] or streams
    if not streams:
        raise ValueError(f"{name} has no moving pictures, only {_kinds(container)}")
    stream = max(streams, key=lambda one: (bool(one.disposition & Disposition.default), -one.index))
    context = stream.codec_context
    if context is None:
        raise ValueError(f"{name} is coded in a way that cannot be decoded here")
    check_frame_size(context.width, context.height, name, settings)
    return stream


def check_frame_size(width: int, height: int, name: str, settings: MediaSettings) -> None:
    """Refuse frames that are too large, before any is decoded.

    Raises:
        ValueError: more pixels than the settings allow.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"{name} announces frames of {width} x {height} pixels; the file may be damaged")
    if width * height > settings.frame_pixels:
        raise ValueError(
            f"{name} announces frames of {width} x {height} pixels, more than the {settings.frame_pixels:,} allowed; "
            "scale it down first"
        )


def _kinds(container: Any) -> str:
    kinds = {"a cover" if stream.type == "video" else stream.type for stream in container.streams}
    return " and ".join(sorted(kinds)) or "nothing"


def scan(clip: MediaFile, settings: MediaSettings, deadline: ReadDeadline) -> Timeline:
    """Read through a clip without decoding it.

    Raises:
        ValueError: as for :func:`opened`.
    """
    import av

    shown: list[tuple[Any, int, int]] = []
    keys: list[Keyframe] = []
    with opened(clip, settings) as (container, stream):
        try:
            for number, packet in enumerate(_packets(container, stream, deadline)):
                if packet.is_keyframe or not keys:
                    keys.append(Keyframe(number, packet.pts, packet.dts))
                if not packet.is_discard:  # outside of what the file's edit list shows
                    shown.append((packet.pts, number, max(packet.duration or 0, 0)))
                if number == MAX_FRAMES:
                    raise ValueError(f"{clip.name} holds more than {MAX_FRAMES:,} frames; send a part of it")
        except av.FFmpegError:
            if not shown:  # else the end is broken, and what is before it is read
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
                if packet.size:  # the last one is empty, and only says that it is the last
                    yield packet
        except IndexError:
            # PyAV stumbles over a stream that turns up after the beginning; asked again, it knows of it.
            more = True


def _has_timestamps(container: Any, stream: Any, times: Sequence[int | None]) -> bool:
    if any(moment is None for moment in times):
        return False
    # AVI holds no times; where frames are shown in another order than they are stored, those made up for it are wrong.
    rising = all(a < b for a, b in itertools.pairwise(times))  # type: ignore[operator]
    return not (container.format.name == "avi" and stream.codec_context.has_b_frames and rising)


class Decoder:
    """Frames of a clip at given times.

    Args:
        clip: its file.
        untimed: as in :class:`Timeline`.
        fit: what becomes of a frame of (width, height).
        threads: of the codec.
        gpu: number of a GPU whose video decoder does it; what that cannot decode is missing.
        progress: counts the frames.
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

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def decode(self, run: DecodeRun) -> dict[int, np.ndarray]:
        """RGB by time, of the frames of a run. What cannot be decoded is missing."""
        frames = self._attempt(run, run.key, run.times, skip=not self._untimed)
        missing = [moment for moment in run.times if moment not in frames]
        if missing and not self._untimed and self._gpu is None:
            # Pictures that are refreshed bit by bit, or frames that are leant on although they say they are not.
            frames |= self._attempt(run, max(run.key - 1, 0), missing, skip=False)
        return frames

    def _attempt(self, run: DecodeRun, key: int, times: Sequence[int], *, skip: bool) -> dict[int, np.ndarray]:
        from av import FFmpegError

        wanted, frames = set(times), {}
        number = itertools.count()
        untimed = self._untimed

        def take(packet: Any) -> None:
            with contextlib.suppress(FFmpegError):  # a damaged packet; the decoder goes on with the next
                for frame in self._context.decode(packet):
                    moment = next(number) if untimed else frame.pts
                    if moment in wanted:
                        frames[moment] = self._rgb(frame)
                        if self._progress is not None:
                            self._progress.add()

        unfed = set(times)
        for packet in self._packets_from(run.keys, key):
            # No other frame leans on these, so that only those that are wanted have to be decoded.
            self._context.skip_frame = "NONREF" if skip and packet.pts not in wanted else "DEFAULT"
            take(packet)
            unfed -= frames.keys() if untimed else {packet.pts}
            if not unfed:
                break
        take(None)
        return frames

    def _packets_from(self, keys: Mapping[int, Keyframe], key: int) -> Iterator[Any]:
        """Packets from a keyframe on; where seeking does not get there, from the beginning of the file."""
        from av import FFmpegError

        # Some containers seek by estimate, and past the mark; then an earlier one is aimed at.
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
        self._container, self._stream = self._files.enter_context(opened(self._clip, self._settings, self._gpu))
        self._context = self._stream.codec_context
        self._context.thread_count = self._threads
        self._context.thread_type = "AUTO"
        # Also for frames that turn out larger than the file's header says.
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
        # Pixels that are not square.
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
    """(rows become columns, then upside down, then left to right) to see a frame as it was meant.

    From its display matrix, which sends (x, y) to (a x + c y, b x + d y); turns by other than quarters are left.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
    if a == d == 0:
        return True, b < 0, c < 0
    return False, d < 0, a < 0
