"""Clips to frames: the moments are chosen exactly, and no more is decoded than they need, on every core.

A first pass reads the clip without decoding it: when each frame is shown, and where decoding can begin (its keyframes).
From that come the frames to take and, for each, the keyframe to start at. Runs of frames that share one are independent
of each other and go to several threads.
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
from aria.media.container import Decoder, DecodeRun, Fit, MediaFile, ReadDeadline, Timeline, scan
from aria.media.limits import JobFile, MediaSettings, available_cores
from aria.media.progress import ProgressCounter, forward_progress
from aria.media.rgb import write_sizes
from aria.workers.cancellation import map_in_context

MAX_THREADS = 16
DECODER_BYTES = 1 << 30
"""What the decoders of one clip may hold together, if each keeps :data:`FRAMES_HELD` frames; one may hold more."""
FRAMES_HELD = 20


class FrameSelection(NamedTuple):
    """What is wanted of a clip: ``num_frames``, or ``fps`` with at most ``max_frames``."""

    num_frames: int | None
    fps: float | None
    max_frames: int | None

    def check(self, settings: MediaSettings) -> None:
        """Raises:
        ValueError: both or neither of the first two, or more frames than are allowed.
        """
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError("give num_frames or fps, and not both")
        for name, value in (("num_frames", self.num_frames), ("max_frames", self.max_frames)):
            if value is not None and not 1 <= value <= settings.max_frames:
                raise ValueError(f"{name} is {value}; 1 to {settings.max_frames} are allowed")


class Plan(NamedTuple):
    """Which frames of a clip are taken, and how they are decoded. Times are in units of ``unit`` seconds."""

    size: tuple[int, int]
    """(width, height) of a frame, as the file's header has it."""
    first: int
    """Time of the clip's first frame."""
    unit: Fraction
    untimed: bool
    """As in :class:`~aria.media.container.Timeline`."""
    animation: str | None
    """Format of an animated image that Pillow decodes."""
    chosen: dict[int, int]
    """Times by the index of each frame that is taken."""
    runs: list[DecodeRun]
    """The same frames by keyframe; empty for animated images."""


def plan(clip: MediaFile, asked: FrameSelection, settings: MediaSettings, deadline: ReadDeadline) -> Plan:
    """Read through a clip and choose frames; nothing is decoded.

    Raises:
        ValueError: no clip, a damaged one, or one that goes over a limit.
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
    return Plan(timeline.size, timeline.times[0], timeline.unit, timeline.untimed, animation, chosen, runs)


def choose_frames(timeline: Timeline, count: int) -> list[int]:
    """Indices of the frames on screen at the middles of ``count`` equal parts, each once."""
    times, length = timeline.times, timeline.end - timeline.times[0]
    if len(times) <= count:
        return list(range(len(times)))
    # Times are whole numbers, so that rounding a moment down changes nothing.
    moments = (times[0] + length * (2 * i + 1) // (2 * count) for i in range(count))
    return list(dict.fromkeys(bisect_right(times, moment) - 1 for moment in moments))


def _runs(timeline: Timeline, chosen: Sequence[int]) -> list[DecodeRun]:
    runs: dict[int, DecodeRun] = {}
    numbers = [key.number for key in timeline.keys]
    for index in chosen:
        moment = timeline.times[index]
        key = max(bisect_right(numbers, timeline.numbers[index]) - 1, 0)
        # A frame that is stored after a keyframe but shown before it may lean on what is stored before it.
        while key and (timeline.keys[key].time or 0) > moment:
            key -= 1
        if key not in runs:
            runs[key] = DecodeRun.at(key, timeline.keys)
        runs[key].times.append(moment)
    return list(runs.values())


def decode(
    clip: MediaFile,
    plan: Plan,
    fit: Fit,
    settings: MediaSettings,
    deadline: ReadDeadline,
    *,
    threads: int | None = None,
    gpu: int | None = None,
) -> dict[int, np.ndarray]:
    """RGB of the planned frames by time, uint8 ``(Y, X, 3)``, upright; what cannot be decoded is missing.

    Args:
        clip: the file.
        plan: of it.
        fit: what becomes of a frame of (width, height).
        settings: limits.
        deadline: ends it.
        threads: at work; None: as many as there are cores, or as keep a GPU's video decoder busy.
        gpu: number of a GPU whose video decoder does it, and nothing else.

    Raises:
        ValueError: the time is up, or the file cannot be read any more.
    """
    if plan.animation is not None:
        return decode_animation(clip, plan.animation, plan.chosen, fit, settings, deadline)
    # A GPU has several decoders in one, and threads only wait for them.
    threads = threads or (available_cores() if gpu is None else MAX_THREADS)
    decoders = max(1, min(threads, MAX_THREADS, len(plan.runs), DECODER_BYTES // _held(plan)))
    waiting, turn = iter(plan.runs), threading.Lock()
    frames: dict[int, np.ndarray] = {}
    progress = ProgressCounter("video", sum(len(run.times) for run in plan.runs))

    def work(_: int) -> None:
        # Cores that have no run of their own help within the runs.
        share = max(1, threads // decoders)
        with Decoder(clip, plan.untimed, fit, share, settings, deadline, gpu, progress) as decoder:
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


def _held(plan: Plan) -> int:
    """Bytes that a decoder may hold: in 4:2:0 a pixel takes one and a half."""
    return max(1, 2 * plan.size[0] * plan.size[1] * FRAMES_HELD)


def read(job: Any, name: str, asked: FrameSelection, settings: MediaSettings, threads: int | None) -> dict[str, Any]:
    """Read frames of the clip in a job's file.

    Calls ``fit(width, height)`` and ``sizes(width, height)``, and before anything is decoded ``take(pixels, bytes)``.
    The result has ``(seconds as numerator and denominator, width, height, number of arrays)`` of
    each frame, whose arrays are ``(height, width, 3)``.
    """
    forward_progress(job)
    clip, deadline = JobFile(job, name), ReadDeadline.for_job(job, name, settings.decode_timeout)
    planned = plan(clip, asked, settings, deadline)
    return _read(job, clip, planned, settings, deadline, threads)


def read_planned(job: Any, name: str, planned: Any, settings: MediaSettings) -> dict[str, Any]:
    """:func:`read` by a plan that :func:`make_plan` gave."""
    forward_progress(job)
    return _read(
        job, JobFile(job, name), planned, settings, ReadDeadline.for_job(job, name, settings.decode_timeout), None
    )


def make_plan(job: Any, name: str, asked: FrameSelection, settings: MediaSettings) -> list[Any]:
    """The plan of the clip in a job's file, as JSON; pixels and memory are asked for as by :func:`read`."""
    planned = plan(JobFile(job, name), asked, settings, ReadDeadline.for_job(job, name, settings.decode_timeout))
    _reserve(job, planned)
    runs = [(run.key, list(run.keys.items()), run.times) for run in planned.runs]
    unit = planned.unit.numerator, planned.unit.denominator
    return [planned.size, planned.first, unit, planned.untimed, planned.animation, list(planned.chosen.items()), runs]


def _read(
    job: Any, clip: MediaFile, planned: Plan, settings: MediaSettings, deadline: ReadDeadline, threads: int | None
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


def _reserve(job: Any, planned: Plan) -> None:
    """Ask for the pixels and the memory of all frames, by what the header says of their size."""
    width, height = job.call("fit", *planned.size)
    sizes = job.call("sizes", width, height) or [(width, height)]
    pixels = len(planned.chosen) * sum(width * height for width, height in sizes)
    decoders = max(_held(planned), min(DECODER_BYTES, len(planned.runs) * _held(planned)))
    # Frames that are about to be handed over lie in memory twice.
    job.call("take", pixels, decoders + 6 * pixels)
