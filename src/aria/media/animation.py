"""Decode animated images with Pillow: WebP, and AVIF with transparency, which FFmpeg cannot do."""

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
"""Animation flag in the header of a WebP file."""
_SHORTEST_MS, _DEFAULT_MS = 10, 100
"""Frames of at most 10 ms are shown for 100 ms, as in browsers."""


def animation_format(clip: MediaFile, settings: MediaSettings) -> str | None:
    """The format ("WEBP" or "AVIF") of an animated image that this module decodes; None: leave it to FFmpeg."""
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
        except Exception:  # damaged, or Pillow lacks the codec: FFmpeg reports that or decodes without transparency
            return None


def scan_webp(clip: MediaFile, settings: MediaSettings, deadline: ReadDeadline) -> Timeline:
    """Read the frame times of an animated WebP, without decoding.

    Raises:
        ValueError: No frames, too many, or too large ones.
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
    """Decode frames of an animated image to RGB, by time. Frames that cannot be decoded are missing.

    Args:
        clip: The file.
        format: "WEBP" or "AVIF".
        chosen: Maps the index of each wanted frame to its time.
        fit: Maps the (width, height) of a frame to the size to resize it to.
        settings: Background colour.
        deadline: Ends the decoding.

    Raises:
        ValueError: The time is up.
    """
    frames: dict[int, np.ndarray] = {}
    with clip.file() as file:
        try:
            image = Image.open(strip_metadata(file)[0], formats=[format])
        except Exception:  # decoders of damaged files raise errors of every kind
            return {}
        with image:
            # WebP frames build on earlier ones. Decode one at a time, so that the deadline can end it.
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
