"""Clips to frames: the moments are chosen exactly, and no more is decoded than they need, on every core.

A first pass reads the clip without decoding it: when each frame is shown, and where decoding can begin (its keyframes).
From that come the frames to take and, for each, the keyframe to start at. Runs of frames that share one are independent
of each other and go to several workers.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np

from aria.media.animation import animation_format, decode_animation, webp_timeline
from aria.media.container import Decoder, Fit, Timeline, Watch, cores, on_gpu, scan
from aria.media.limits import MediaSettings
from aria.media.open import Opened
from aria.media.progress import ProgressCounter
from aria.workers.cancellation import map_in_context

MOST_WORKERS = 16
DECODER_BYTES = 2 << 30
"""What the workers' decoders may hold together, if each keeps :data:`FRAMES_HELD` frames."""
FRAMES_HELD = 20


class Frame(NamedTuple):
    """A frame of a clip."""

    seconds: Fraction
    """Since the clip's first frame."""
    rgb: np.ndarray
    """uint8 ``(Y, X, 3)``, upright."""

    @property
    def stamp(self) -> str:
        """``MM:SS``; minutes may go beyond 59."""
        minutes, seconds = divmod(int(self.seconds), 60)
        return f"{minutes:02d}:{seconds:02d}"


def read_clip(
    clip: Opened,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    fit: Fit | None = None,
    settings: MediaSettings | None = None,
    workers: int | None = None,
) -> list[Frame]:
    """Frames from all over a clip.

    They are those on screen at the middles of N equal parts of its length. A clip of N frames or fewer gives each of
    them once; no frame is ever given twice. With a constant rate this is the authors' choice,
    ``trunc(T / N * (i + 0.5))`` of T frames.

    Args:
        clip: the file, as :func:`~aria.media.open.open_medium` lets it in.
        num_frames: N.
        fps: instead of ``num_frames``: N as so many frames a second, at most ``max_frames``.
        max_frames: with ``fps``; None: what the settings allow.
        fit: what becomes of a frame of (width, height), asked for each; None: frames stay as they are.
        settings: limits on frames, pixels and seconds; None: those of :class:`MediaSettings`.
        workers: decoders at work; None: as many as there are cores, or as keep a GPU's video decoder busy.

    Returns:
        Frames in the order of their times; what cannot be decoded is left out.

    Raises:
        ValueError: no clip, a damaged one, or one that goes over a limit.
    """
    settings = settings or MediaSettings()
    if (num_frames is None) == (fps is None):
        raise ValueError("give num_frames or fps, and not both")
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None and not 1 <= value <= settings.max_frames:
            raise ValueError(f"{name} is {value}; 1 to {settings.max_frames} are allowed")
    watch = Watch(clip.name, settings.decode_timeout)
    animation = animation_format(clip, settings)
    timeline = (webp_timeline if animation == "WEBP" else scan)(clip, settings, watch)
    if timeline.seconds > settings.clip_seconds:
        raise ValueError(
            f"{clip.name} is {float(timeline.seconds):.0f} s long, but {settings.clip_seconds:g} s are allowed; "
            "send a part of it"
        )
    count = num_frames
    if count is None:
        assert fps is not None, "checked above"
        count = min(max_frames or settings.max_frames, max(1, round(timeline.seconds * Fraction(fps))))
    chosen = choose(timeline, count)
    fit = fit or _as_it_is
    if animation is not None:
        frames = decode_animation(clip, animation, timeline, chosen, fit, settings, watch)
    else:
        frames = _decode(clip, timeline, _runs(timeline, chosen), fit, workers, settings, watch)
    if not frames:
        raise ValueError(f"no frame of {clip.name} can be decoded; the file may be truncated or damaged")
    first = timeline.times[0]
    return [Frame((moment - first) * timeline.unit, frames[moment]) for moment in sorted(frames)]


def choose(timeline: Timeline, count: int) -> list[int]:
    """Indices of the frames on screen at the middles of ``count`` equal parts, each once."""
    times, length = timeline.times, timeline.end - timeline.times[0]
    if len(times) <= count:
        return list(range(len(times)))
    # Times are whole numbers, so that rounding a moment down changes nothing.
    moments = (times[0] + length * (2 * i + 1) // (2 * count) for i in range(count))
    return list(dict.fromkeys(bisect_right(times, moment) - 1 for moment in moments))


def _as_it_is(width: int, height: int) -> tuple[int, int]:
    return width, height


class _Run(NamedTuple):
    """Frames that are decoded from one keyframe on."""

    key: int
    times: list[int]


def _runs(timeline: Timeline, chosen: Sequence[int]) -> list[_Run]:
    runs: dict[int, _Run] = {}
    numbers = [key.number for key in timeline.keys]
    for index in chosen:
        moment = timeline.times[index]
        key = max(bisect_right(numbers, timeline.numbers[index]) - 1, 0)
        # A frame that is stored after a keyframe but shown before it may lean on what is stored before it.
        while key and (timeline.keys[key].time or 0) > moment:
            key -= 1
        runs.setdefault(key, _Run(key, [])).times.append(moment)
    return list(runs.values())


def _gpu(decoder: str, name: str) -> int | None:
    """The number of the GPU to decode on, by ``MediaSettings.clip_decoder``."""
    if decoder == "cpu" or (decoder == "auto" and not _cuda_is_used()):
        return None
    import torch

    if decoder == "auto":
        gpu = max(range(torch.cuda.device_count()), key=torch.cuda.memory_allocated)
        return gpu if _decodes(gpu) else None
    gpu = torch.device(decoder).index or 0
    if gpu >= torch.cuda.device_count() or not _decodes(gpu):
        raise ValueError(f"{name} cannot be decoded on {decoder}: no video decoder is found there; use cpu or auto")
    return gpu


def _cuda_is_used() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


@cache
def _decodes(gpu: int) -> bool:
    """Whether a GPU's video decoder can be used: a driver may come without it, so a picture is tried."""
    import av
    from av.codec import CodecContext

    try:
        coder = CodecContext.create("libx264", "w")
        assert isinstance(coder, av.VideoCodecContext)
        coder.width = coder.height = 128
        coder.pix_fmt, coder.time_base = "yuv420p", Fraction(1, 25)
        packets = [*coder.encode(av.VideoFrame(128, 128, "yuv420p")), *coder.encode(None)]
        decoder = CodecContext.create("h264", "r", hwaccel=on_gpu(gpu, or_cpu=False))
        frames = [frame for packet in (*packets, None) for frame in decoder.decode(packet)]
        return bool(frames) and all(frame.format.name == "cuda" for frame in frames)
    except (av.FFmpegError, NotImplementedError, RuntimeError):
        return False


def _decode(
    clip: Opened,
    timeline: Timeline,
    runs: Sequence[_Run],
    fit: Fit,
    threads: int | None,
    settings: MediaSettings,
    watch: Watch,
) -> dict[int, np.ndarray]:
    gpu = _gpu(settings.clip_decoder, clip.name)
    # A GPU has several decoders in one, and threads only wait for them.
    threads = threads or (cores() if gpu is None else MOST_WORKERS)
    held = max(1, 2 * timeline.pixels * FRAMES_HELD)  # in 4:2:0 a pixel takes one and a half bytes
    workers = max(1, min(threads, MOST_WORKERS, len(runs), DECODER_BYTES // held))
    waiting, turn = iter(runs), threading.Lock()
    frames: dict[int, np.ndarray] = {}
    progress = ProgressCounter("video", sum(len(run.times) for run in runs))

    def work(_: int) -> None:
        # Cores that have no run of their own help within the runs.
        with Decoder(clip, timeline, fit, max(1, threads // workers), settings, watch, gpu, progress) as decoder:
            while True:
                with turn:
                    run = next(waiting, None)
                if run is None:
                    return
                frames.update(decoder.decode(run.key, run.times))

    with ThreadPoolExecutor(workers) as pool:
        try:
            map_in_context(pool, work, range(workers))
        except BaseException:
            watch.stop()
            raise
    return frames
