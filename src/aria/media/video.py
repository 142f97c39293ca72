"""Sample frames of video clips at exact times, decoding only what they need, in parallel.

A first pass reads the packets without decoding: presentation times and keyframes. These give the frames to take and,
for each, the keyframe to start from. Runs of frames that share a keyframe are independent and are decoded in parallel.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aria.media.animation import animation_format, decode_animation, scan_webp
from aria.media.container import ClipDecoder, DecodeRun, Fit, MediaFile, ReadDeadline, Timeline, scan
from aria.media.limits import JobFile, MediaSettings, available_cores
from aria.media.progress import ProgressCounter, forward_progress
from aria.media.rgb import write_sizes
from aria.workers.cancellation import map_in_context

MAX_THREADS = 16
DECODER_BYTES = 1 << 30
"""Memory for all decoders of one clip, if each holds :data:`FRAMES_HELD` frames. A single decoder may exceed it."""
FRAMES_HELD = 20


class FrameSelection(NamedTuple):
    """How many frames to sample: ``num_frames``, or ``fps`` with at most ``max_frames``."""

    num_frames: int | None
    fps: float | None
    max_frames: int | None

    def check(self, settings: MediaSettings) -> None:
        """Check against the limits.

        Raises:
            ValueError: Both or neither of ``num_frames`` and ``fps``, or more frames than allowed.
        """
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError("give num_frames or fps, and not both")
        for name, value in (("num_frames", self.num_frames), ("max_frames", self.max_frames)):
            if value is not None and not 1 <= value <= settings.max_frames:
                raise ValueError(f"{name} is {value}; 1 to {settings.max_frames} are allowed")


class DecodePlan(NamedTuple):
    """The frames to take of a clip and how to decode them. Times are in units of ``unit`` seconds."""

    size: tuple[int, int]
    """(width, height) of a frame, from the header."""
    first: int
    """Time of the first frame of the clip."""
    unit: Fraction
    untimed: bool
    """As in :class:`~aria.media.container.Timeline`."""
    animation: str | None
    """Format of an animated image to decode with Pillow; None: a video."""
    chosen: dict[int, int]
    """Maps the index of each frame taken to its time."""
    runs: list[DecodeRun]
    """The same frames grouped by keyframe; empty for animated images."""


def plan(clip: MediaFile, asked: FrameSelection, settings: MediaSettings, deadline: ReadDeadline) -> DecodePlan:
    """Scan a clip and choose frames, without decoding.

    Raises:
        ValueError: Not a clip, damaged, or over a limit.
    """
    animation = animation_format(clip, settings)
    timeline = (scan_webp if animation == "WEBP" else scan)(clip, settings, deadline)
    if timeline.seconds > settings.clip_seconds:
        raise ValueError(
            f"{clip.name} is {float(timeline.seconds):.0f} s long, but {settings.clip_seconds:g} s are allowed; "
            "send a part of it"
        )
    count = asked.num_frames
    if count is None:
        assert asked.fps is not None, "checked before"
        count = min(asked.max_frames or settings.max_frames, max(1, round(timeline.seconds * Fraction(asked.fps))))
    chosen = {index: timeline.times[index] for index in choose_frames(timeline, count)}
    runs = [] if animation else _runs(timeline, list(chosen))
    return DecodePlan(timeline.size, timeline.times[0], timeline.unit, timeline.untimed, animation, chosen, runs)


def choose_frames(timeline: Timeline, count: int) -> list[int]:
    """Indices of the frames on screen in the middle of each of ``count`` equal parts, without repeats."""
    times, length = timeline.times, timeline.end - timeline.times[0]
    if len(times) <= count:
        return list(range(len(times)))
    # Times are integers, so rounding down does not change the result.
    moments = (times[0] + length * (2 * i + 1) // (2 * count) for i in range(count))
    return list(dict.fromkeys(bisect_right(times, moment) - 1 for moment in moments))


def _runs(timeline: Timeline, chosen: Sequence[int]) -> list[DecodeRun]:
    runs: dict[int, DecodeRun] = {}
    numbers = [key.number for key in timeline.keys]
    for index in chosen:
        moment = timeline.times[index]
        key = max(bisect_right(numbers, timeline.numbers[index]) - 1, 0)
        # A frame stored after a keyframe but shown before it may reference frames before the keyframe.
        while key and (timeline.keys[key].time or 0) > moment:
            key -= 1
        if key not in runs:
            runs[key] = DecodeRun.at(key, timeline.keys)
        runs[key].times.append(moment)
    return list(runs.values())


def decode(
    clip: MediaFile,
    plan: DecodePlan,
    fit: Fit,
    settings: MediaSettings,
    deadline: ReadDeadline,
    *,
    threads: int | None = None,
    gpu: int | None = None,
) -> dict[int, np.ndarray]:
    """Decode the planned frames to upright RGB, uint8 ``(Y, X, 3)``, by time. Undecodable frames are missing.

    Args:
        clip: The file.
        plan: The plan made from it.
        fit: Maps the (width, height) of a frame to the size to decode it at.
        settings: Limits.
        deadline: Ends the decoding.
        threads: Number of threads; None: one per core, or as many as keep the video decoder of a GPU busy.
        gpu: Index of the GPU whose video decoder to use, without fallback.

    Raises:
        ValueError: The time is up, or the file can no longer be read.
    """
    if plan.animation is not None:
        return decode_animation(clip, plan.animation, plan.chosen, fit, settings, deadline)
    # GPUs have several decoder units, and the threads only wait for them.
    threads = threads or (available_cores() if gpu is None else MAX_THREADS)
    decoders = max(1, min(threads, MAX_THREADS, len(plan.runs), DECODER_BYTES // _decoder_bytes(plan)))
    waiting, turn = iter(plan.runs), threading.Lock()
    frames: dict[int, np.ndarray] = {}
    progress = ProgressCounter("video", sum(len(run.times) for run in plan.runs))

    def work(_: int) -> None:
        # Spare cores are used as codec threads within the runs.
        share = max(1, threads // decoders)
        with ClipDecoder(clip, plan.untimed, fit, share, settings, deadline, gpu, progress) as decoder:
            while True:
                with turn:
                    run = next(waiting, None)
                if run is None:
                    return
                frames.update(decoder.decode(run))

    with ThreadPoolExecutor(decoders) as pool:
        try:
            map_in_context(pool, work, range(decoders))
        except BaseException:
            deadline.stop()
            raise
    return frames


def _decoder_bytes(plan: DecodePlan) -> int:
    """Memory of one decoder. A pixel takes 1.5 bytes in 4:2:0."""
    return max(1, 2 * plan.size[0] * plan.size[1] * FRAMES_HELD)


def read(job: Any, name: str, asked: FrameSelection, settings: MediaSettings, threads: int | None) -> dict[str, Any]:
    """Job: read frames of a clip.

    Calls ``fit(width, height)`` and ``sizes(width, height)``, and ``take(pixels, bytes)`` before decoding. The result
    has ``(time, seconds as numerator and denominator, width, height, number of arrays)`` for each frame, whose arrays
    are ``(height, width, 3)``.
    """
    forward_progress(job)
    clip, deadline = JobFile(job, name), ReadDeadline.for_job(job, name, settings.decode_timeout)
    planned = plan(clip, asked, settings, deadline)
    return _read(job, clip, planned, settings, deadline, threads)


def read_planned(job: Any, name: str, planned: Any, settings: MediaSettings) -> dict[str, Any]:
    """Job: like :func:`read`, with a plan made by :func:`make_plan`."""
    forward_progress(job)
    return _read(
        job, JobFile(job, name), planned, settings, ReadDeadline.for_job(job, name, settings.decode_timeout), None
    )


def make_plan(job: Any, name: str, asked: FrameSelection, settings: MediaSettings) -> list[Any]:
    """Job: make the plan of a clip, as JSON. Pixels and memory are reserved as in :func:`read`."""
    planned = plan(JobFile(job, name), asked, settings, ReadDeadline.for_job(job, name, settings.decode_timeout))
    _reserve(job, planned)
    runs = [(run.key, list(run.keys.items()), run.times) for run in planned.runs]
    unit = planned.unit.numerator, planned.unit.denominator
    return [planned.size, planned.first, unit, planned.untimed, planned.animation, list(planned.chosen.items()), runs]


def _read(
    job: Any, clip: MediaFile, planned: DecodePlan, settings: MediaSettings, deadline: ReadDeadline, threads: int | None
) -> dict[str, Any]:
    @cache
    def fit(width: int, height: int) -> tuple[int, int]:
        width, height = job.call("fit", width, height)
        return width, height

    _reserve(job, planned)
    frames = decode(clip, planned, fit, settings, deadline, threads=threads)
    read = []
    for moment in sorted(frames):
        pixels = frames.pop(moment)
        height, width = pixels.shape[:2]
        count = write_sizes(job, Image.fromarray(pixels), job.call("sizes", width, height))
        seconds = (moment - planned.first) * planned.unit
        read.append((moment, seconds.numerator, seconds.denominator, width, height, count))
    return {"frames": read}


def _reserve(job: Any, planned: DecodePlan) -> None:
    """Reserve pixels and memory for all frames, by the frame size in the header."""
    width, height = job.call("fit", *planned.size)
    sizes = job.call("sizes", width, height) or [(width, height)]
    pixels = len(planned.chosen) * sum(width * height for width, height in sizes)
    decoders = max(_decoder_bytes(planned), min(DECODER_BYTES, len(planned.runs) * _decoder_bytes(planned)))
    # Frames are in memory twice while they are handed over.
    job.call("take", pixels, decoders + 6 * pixels)
