"""Animated images that FFmpeg cannot read (WebP), or reads without their transparency (AVIF), through Pillow."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from PIL import Image

from aria.media import rgb
from aria.media.container import MAX_FRAMES, Fit, MediaFile, ReadDeadline, Timeline, check_frame_size
from aria.media.limits import MediaSettings
from aria.media.metadata import strip_metadata

_ANIMATED = 2
"""A flag of a WebP's header."""
_SHORTEST_MS, _DEFAULT_MS = 10, 100
"""Frames of no more milliseconds than the first are shown for the second, as browsers do."""


def animation_format(clip: MediaFile, settings: MediaSettings) -> str | None:
    """WEBP or AVIF where a clip is an animated image for this module, None where it is for FFmpeg."""
    with clip.file() as file:
        head = file.read(32)
        if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and head[20] & _ANIMATED:
            return "WEBP"
        if settings.background is None or head[4:8] != b"ftyp" or b"avis" not in head[8:]:
            return None
        file.seek(0)
        try:
            with Image.open(strip_metadata(file)[0], formats=["AVIF"]) as image:
                return "AVIF" if image.has_transparency_data else None
        except Exception:  # damaged, or without Pillow's codec: FFmpeg says so, or shows it without transparency
            return None


def scan_webp(clip: MediaFile, settings: MediaSettings, deadline: ReadDeadline) -> Timeline:
    """When the frames of an animated WebP are shown; nothing is decoded.

    Raises:
        ValueError: it holds no frames, too many, or too large ones.
    """
    times: list[int] = []
    end, canvas = 0, (0, 0)
    with clip.file() as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            deadline.check()
            kind, size = struct.unpack("<4sI", header)
            place, body = file.tell(), file.read(min(size, 16)).ljust(16, b"\0")
            if kind == b"VP8X":
                width, height = (1 + int.from_bytes(body[at : at + 3], "little") for at in (4, 7))
                check_frame_size(width, height, clip.name, settings)
                canvas = width, height
            elif kind == b"ANMF":
                shown = int.from_bytes(body[12:15], "little")
                times.append(end)
                end += shown if shown > _SHORTEST_MS else _DEFAULT_MS
            if len(times) > MAX_FRAMES:
                raise ValueError(f"{clip.name} holds more than {MAX_FRAMES:,} frames; send a part of it")
            file.seek(place + size + size % 2)
    if not times:
        raise ValueError(f"{clip.name} holds no frames; the file may be truncated or damaged")
    return Timeline(times, list(range(len(times))), end, Fraction(1, 1000), [], True, canvas)


def decode_animation(
    clip: MediaFile,
    format: str,
    chosen: Mapping[int, int],
    fit: Fit,
    settings: MediaSettings,
    deadline: ReadDeadline,
) -> dict[int, np.ndarray]:
    """RGB by time. What cannot be decoded is missing.

    Args:
        chosen: by a frame's index, its time.

    Raises:
        ValueError: the time is up.
    """
    frames: dict[int, np.ndarray] = {}
    with clip.file() as file:
        try:
            image = Image.open(strip_metadata(file)[0], formats=[format])
        except Exception:  # decoders of damaged files raise errors of every kind
            return {}
        with image:
            # Frames of a WebP are changes of those before: one at a time, so that the deadline can end it.
            for index in range(max(chosen) + 1) if format == "WEBP" else sorted(chosen):
                deadline.check()
                try:
                    image.seek(index)
                    image.load()
                except Exception:
                    break
                if index in chosen:
                    frame = rgb.upright_rgb(image, clip.name, settings.background)
                    size = fit(*frame.size)
                    frame = frame if size == frame.size else frame.resize(size, Image.Resampling.BICUBIC)
                    frames[chosen[index]] = np.asarray(frame)
    return frames
